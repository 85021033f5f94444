"""The command line: flags, the run, the report. Everything a command does is a few calls into the packages below it."""

__version__ = "0.1.0"
