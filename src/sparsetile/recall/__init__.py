"""The experiment ``sparsetile recall``: which ways of choosing tiles find what a query asks for."""
