"""Targets in a user's units: parameters, bytes of weights, memory with the cache, latency."""
