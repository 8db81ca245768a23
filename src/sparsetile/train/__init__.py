"""A byte-level language model trained with block-sparse attention, next to dense attention."""
