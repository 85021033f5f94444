"""Allocators that spread a sparsity over the model."""
