"""Commands: flags, the run, the report. A command is a few calls into the packages below it."""

__version__ = "0.1.0"
