"""Benchmarks of `launch.bench`."""
