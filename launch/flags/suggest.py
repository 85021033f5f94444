"""Suggest what a misspelt name may have meant."""

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str:
    """Return the known name that is most like a word; empty if none is.

    Args:
      word: What was written, in any case, with hyphens or underscores.
      known: Names that there are.
    """
    folded = {_fold(name): name for name in known}
    matches = difflib.get_close_matches(_fold(word), folded, n=1)
    return folded[matches[0]] if matches else ""


def _fold(name: str) -> str:
    """Return a name without what is easily written otherwise."""
    return name.lower().replace("-", "_")


def one_of(word: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown name: the closest one, and all that there are.

    Args:
      word: What was written.
      known: Names that there are.
    """
    names = list(known)
    match = closest(word, names)
    listed = f"there are {', '.join(names)}"
    return f"did you mean {match}? {listed}" if match else listed
