"""Benchmarks that launch.bench runs."""
