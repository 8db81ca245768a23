"""Block-sparse attention for PyTorch, exact over the keys it keeps, forward and backward."""
