"""Sinks of journals."""

from typing import Any


class NoBlocks:
    """A sink without blocks, as a search has none."""

    blocks = 0
    files = ()

    def mark(self) -> None:
        """Return no mark."""
        return None

    def rewind(self, mark: Any) -> None:
        """Leave all as it is."""
