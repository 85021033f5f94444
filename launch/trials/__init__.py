"""Trials of a sweep and the backends that run them."""
