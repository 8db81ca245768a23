"""Backends that compute block-sparse attention over a BlockLayout."""
