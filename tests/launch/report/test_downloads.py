"""The progress of downloads: few plain lines in a log, the bytes in each."""

import io

import pytest
from rich.console import Console

from launch.report import downloads


def log(description: str, sizes: list[int], total: int) -> list[str]:
    """Return the lines of a download that arrives in parts."""
    stream = io.StringIO()
    with downloads.download(description, Console(file=stream, width=40)) as progress:
        for size in sizes:
            progress(size, total)
    return stream.getvalue().splitlines()


def test_a_quick_download_is_one_line() -> None:
    sizes = list(range(0, 5 << 20, 1 << 12))
    (line,) = log("downloading [a]/b", [*sizes, 5 << 20], 5 << 20)
    assert line.startswith("downloading [a]/b: 5.0 MiB in ") and "\x1b" not in line


def test_a_slow_download_is_at_most_eleven_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    lines = log("downloading a/b", list(range(0, 1001, 3)), 1000)
    assert 5 < len(lines) <= downloads.LINES + 1
    assert " of 1000 B, " in lines[0] and lines[0].endswith(" left")


def test_nothing_is_said_where_nothing_arrives() -> None:
    assert log("downloading a/b", [], 0) == []


def test_a_terminal_shows_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with downloads.download("downloading a/b", console) as progress:
        progress(1 << 20, 2 << 20)
    assert "downloading a/b" in stream.getvalue() and "1.0/2.0 MiB" in stream.getvalue()
