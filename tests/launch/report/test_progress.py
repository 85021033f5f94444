"""A terminal has one line that is redrawn, a log has few plain ones, and neither ends a run."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from rich.console import Console

from launch.report import console as consoles
from launch.report import progress as shown
from reference.consoles import is_plain, log, terminal, text_of

ROOT = Path(__file__).parents[3]
PROGRAM = """
import time
from launch.report.progress import progress
with progress() as begin:
    advance = begin("caf\\u00e9 on wikitext2", 4, unit="blocks", tokens=4000)
    for _ in range(4):
        time.sleep(0.02)
        advance()
print("the result")
"""


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time in seconds that stages see, under `now.seconds`."""
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(shown.time, "monotonic", lambda: clock.seconds)
    return clock


def line(stage: shown.Stage, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(shown.status_line(stage, width))
    return text_of(console)


def test_a_note_stands_behind_the_position(now: SimpleNamespace) -> None:
    stage = shown.Stage("distilling", 10, "steps", tokens=1000)
    now.seconds += 10.0
    stage.step(1, "loss 0.1234")
    assert "1 of 10 steps, loss 0.1234, 10 tokens/s, 1 min 30 s left" in line(stage, 100)
    assert line(stage, 40) == "distilling 1 of 10 steps, loss 0.1234\n"
    console = log()
    with shown.progress(console) as begin:
        advance = begin("distilling", 10, unit="steps", tokens=1000)
        now.seconds += 10.0
        advance(note="loss 0.1234")
    assert "1 of 10 steps, loss 0.1234, 10 tokens/s" in text_of(console)


@pytest.mark.parametrize("total", [1, 4, 10, 32, 80, 1000])
def test_a_log_has_at_most_ten_plain_lines_behind_the_first(
    total: int, now: SimpleNamespace
) -> None:
    console = log()
    with shown.progress(console) as begin:
        advance = begin("pruning [b]locks", total, unit="blocks", tokens=5000)
        for _ in range(total):
            now.seconds += 200.0
            advance()
    first, *lines = text_of(console).splitlines()
    assert is_plain(text_of(console)) and first == "pruning [b]locks: 5,000 tokens"
    # A step of 200 s is long: with ten steps or fewer, each has its line.
    assert len(lines) == total if total <= 10 else 8 <= len(lines) <= 1 + 200 * total / 300
    assert all(item.startswith("pruning [b]locks: ") for item in lines)
    assert "tokens/s" in lines[0] and "done in" in lines[-1]


def test_a_log_of_quick_stages_has_one_line_a_stage(now: SimpleNamespace) -> None:
    console = log()
    with shown.progress(console) as begin:
        for name in ("one", "two"):
            advance = begin(name, 50)
            for _ in range(50):
                now.seconds += 0.01
                advance()
    assert text_of(console).splitlines() == ["one", "two"]


def test_a_log_is_silent_for_five_minutes_at_most(now: SimpleNamespace) -> None:
    console, last, gaps = log(), 100.0, []
    with shown.progress(console) as begin:
        advance = begin("slow", 10_000)
        for _ in range(2000):
            lines = text_of(console).count("\n")
            now.seconds += 10.0
            advance()
            if text_of(console).count("\n") > lines:
                gaps.append(now.seconds - last)
                last = now.seconds
    assert max(gaps) <= 300 and min(gaps) >= 2


def test_figures_are_position_speed_and_the_time_left(now: SimpleNamespace) -> None:
    stage = shown.Stage("calibrating", 30, "blocks", tokens=30_000)
    assert (stage.position(), stage.rate(), stage.time()) == ("0 of 30 blocks", "", "0.00 s")
    now.seconds += 60
    stage.step(3)
    assert (stage.position(), stage.rate()) == ("3 of 30 blocks", "50 tokens/s")
    assert stage.time() == "9 min 00 s left"
    now.seconds += 30  # while the next step runs, the time left falls
    assert stage.time() == "8 min 30 s left" and stage.rate() == "50 tokens/s"


def test_steps_of_an_earlier_run_do_not_count_as_speed(now: SimpleNamespace) -> None:
    stage = shown.Stage("pruning", 30, "blocks", tokens=30_000, resumed=28)
    assert stage.position() == "28 of 30 blocks" and stage.time() == "0.00 s"
    now.seconds += 10
    stage.step(1)
    assert (stage.rate(), stage.time()) == ("100 tokens/s", "10.0 s left")


def test_downloads_are_shown_in_bytes(now: SimpleNamespace) -> None:
    stage = shown.Stage("model", 4 << 20, shown.BYTES)
    now.seconds += 2
    stage.step(1 << 20)
    assert stage.extent() == "4.0 MiB" and stage.position() == "1.0 MiB of 4.0 MiB"
    assert stage.rate() == "512.0 KiB/s" and stage.time() == "6.00 s left"


def test_a_stage_that_is_finished_already_is_not_shown() -> None:
    for console in (log(), terminal()):
        with shown.progress(console) as begin:
            begin("nothing to do", 0)()
            begin("done before", 5, done=5)()
        assert text_of(console) == ""


@pytest.mark.parametrize("width", [1, 10, 20, 40, 60, 80, 120, 300])
@pytest.mark.parametrize("name", ["pruning", "seed 1: dense model: perplexity on " + "x" * 200])
def test_the_line_of_a_terminal_fits_its_width(name: str, width: int, now: SimpleNamespace) -> None:
    stage = shown.Stage(name, 3000, "blocks", tokens=10_000_000)
    now.seconds += 100
    stage.step(1000)
    text = line(stage, width)
    assert text.count("\n") == 1 and len(text) <= width + 1
    short = name == "pruning"
    assert ("1,000 of 3,000 blocks" in text) == (width > 20)
    assert ("3 min 20 s left" in text) == (width >= (60 if short else 80))
    assert ("tokens/s" in text) == (width >= (80 if short else 120))
    assert ("━" in text) == (width >= (40 if short else 300))


def test_the_line_of_a_terminal_is_one_line_whatever_a_file_is_called() -> None:
    assert line(shown.Stage("perplexity on a\nb\tc", 1), 80).startswith("perplexity on a b c")


def test_a_terminal_has_a_bar_and_keeps_a_line_for_each_stage() -> None:
    console = terminal()
    with shown.progress(console) as begin:
        for name in ("[red]one", "two"):
            advance = begin(name, 3, unit="blocks")
            for _ in range(3):
                advance()
    text = text_of(console)
    assert "━" in text and "0 of 3 blocks" in text
    assert [s for s in text.splitlines() if "done in" in s] == [
        s for s in text.splitlines() if re.search(r"(\[red\]one|two): done in 0\.\d\d s$", s)
    ]
    assert text.count("done in") == 2


def started_since(before: set[threading.Thread]) -> int:
    """Count the threads that started since, without those that end within a moment."""
    for thread in set(threading.enumerate()) - before:
        thread.join(0.1)
    return len(set(threading.enumerate()) - before)


def test_no_thread_outlives_a_stage() -> None:
    before = set(threading.enumerate())
    with shown.progress(terminal()) as begin:
        advance = begin("work", 2)
        assert started_since(before) == 1
        advance(2)
        assert started_since(before) == 0
        begin("more", 2)
    assert started_since(before) == 0


def test_an_error_inside_ends_the_line_and_passes_through() -> None:
    console, before = terminal(), set(threading.enumerate())
    with pytest.raises(RuntimeError, match="inside"), shown.progress(console) as begin:
        begin("blocks", 2)()
        raise RuntimeError("inside")
    assert text_of(console).rstrip().endswith("\x1b[2K")  # the line is erased
    assert "\x1b[?25h" in text_of(console) and started_since(before) == 0


def test_progress_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with shown.progress() as begin:
        begin("blocks", 1)()
    captured = capfd.readouterr()
    assert captured.err == "blocks\n" and not captured.out


def test_only_the_primary_process_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for console in (log(), terminal()):
        with shown.progress(console) as begin:
            begin("blocks", 2)()
        assert text_of(console) == ""


def test_colours_in_a_log_bring_no_line_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not consoles.error_console().is_interactive


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_stream_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        consoles.note("a note")
        with shown.progress() as begin:
            begin("blocks", 1)()


def run_program(**settings: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | settings
    return {"args": [sys.executable, "-c", PROGRAM], "env": environment}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "redrawn"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True),
        ({"TERM": "xterm", "PYTHONIOENCODING": "ascii"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": ""}, True),
    ],
    ids=str,
)
def test_terminals_of_every_kind(settings: dict[str, str], redrawn: bool) -> None:
    main, side = pty.openpty()
    process = subprocess.Popen(**run_program(**settings), stdout=subprocess.PIPE, stderr=side)
    os.close(side)
    seen = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    assert process.communicate()[0] == b"the result\n" and process.returncode == 0
    assert (b"\x1b[2K" in seen or b"\x1b[1A" in seen) == redrawn
    assert b"Traceback" not in seen and b"on wikitext2" in seen
    if "NO_COLOR" in settings:
        assert not re.search(rb"\x1b\[[\d;]*3\dm", seen)
    if "PYTHONIOENCODING" in settings:
        seen.decode("ascii")


@pytest.mark.slow
def test_a_terminal_that_goes_away_and_a_closed_pipe_leave_result_and_exit_code() -> None:
    for close in (True, False):
        main, side = pty.openpty() if close else os.pipe()
        os.close(main)
        done = subprocess.run(**run_program(), stdout=subprocess.PIPE, stderr=side)
        os.close(side)
        assert (done.stdout, done.returncode) == (b"the result\n", 0)
