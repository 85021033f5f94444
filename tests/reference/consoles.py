"""Consoles that write into memory."""

import io
import re

from rich.console import Console


def terminal(width: int = 100) -> Console:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, force_interactive=True, width=width)


def log() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def is_plain(text: str) -> bool:
    return not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
