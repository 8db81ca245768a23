"""Modules: block-sparse attention as ``torch.nn`` building blocks."""
