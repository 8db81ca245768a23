"""Which pattern a trained model can do with: ``sparsetile profile``."""
