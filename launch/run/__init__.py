"""The parts of one pruning run."""
