"""Time, memory and error of every backend against dense attention and other block-sparse kernels."""
