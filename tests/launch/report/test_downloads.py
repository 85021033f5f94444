"""The progress of downloads: few plain lines in a log, the bytes in each."""

import io

import pytest
from rich.console import Console

from launch.report import downloads, progress


def log(description: str, sizes: list[int], total: int) -> list[str]:
    """Return the lines of a download that arrives in parts."""
    stream = io.StringIO()
    with downloads.download(description, Console(file=stream, width=40)) as told:
        for size in sizes:
            told(size, total)
    return stream.getvalue().splitlines()


def test_a_quick_download_is_one_line() -> None:
    sizes = list(range(0, 5 << 20, 1 << 12))
    assert log("downloading [a]/b", [*sizes, 5 << 20], 5 << 20) == ["downloading [a]/b: 5.0 MiB"]


def test_a_slow_download_is_at_most_eleven_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LEAST_SECONDS", 0.0)
    first, *lines = log("downloading a/b", [*range(0, 1001, 3), 1000], 1000)
    assert first == "downloading a/b: 1000 B" and 5 < len(lines) <= progress.PARTS
    assert " of 1000 B, " in lines[0] and lines[0].endswith(" left")
    assert lines[-1].startswith("downloading a/b: done in ") and lines[-1].endswith("/s")


def test_bytes_that_are_sent_again_count_once() -> None:
    stream = io.StringIO()
    with downloads.download("a/b", Console(file=stream, force_terminal=True, width=100)) as told:
        for done in (600, 100, 600, 700):
            told(done, 1000)
    assert "700 B of 1000 B" in stream.getvalue()


def test_nothing_is_said_where_nothing_arrives() -> None:
    assert log("downloading a/b", [], 0) == []


def test_a_terminal_shows_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with downloads.download("downloading a/b", console) as told:
        told(1 << 20, 2 << 20)
    assert "downloading a/b" in stream.getvalue() and "1.0 MiB of 2.0 MiB" in stream.getvalue()
