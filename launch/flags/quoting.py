"""Quote the words of a command for a shell, as a person would."""

import re
import shlex
from collections.abc import Iterable


def quote(word: str) -> str:
    """Return a word quoted for a shell.

    Args:
      word: Any text.
    """
    # shlex writes a quote inside quotes as '"'"'. Double quotes do where nothing in them is special
    # to a shell, interactive ones included.
    if "'" in word and not re.search(r'["$`\\!]', word):
        return f'"{word}"'
    return shlex.quote(word)


def join(words: Iterable[str]) -> str:
    """Return a command that a shell splits into these words."""
    return " ".join(map(quote, words))
