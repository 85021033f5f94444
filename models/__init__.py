"""LLaMA and OPT families in JAX, their checkpoints, and surgery on them.

No module of this package knows why a weight is removed.
"""
