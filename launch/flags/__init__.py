"""Flags of the commands: parsing, shared groups, method calls, papers' protocols."""
