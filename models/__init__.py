"""Flax ports of the LLaMA and OPT families, their checkpoints, and surgery on them. Nothing here knows why a weight is removed."""
