"""Methods that remove heads, neurons or blocks."""
