"""Tokens to calibrate on, streaming statistics, and the one walk over a model's blocks."""
