"""Command-line flags: parsing, shared groups, method calls, protocols."""
