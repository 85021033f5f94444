"""Odd terminals, closed streams and readers that leave end no command and change no result."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.flags import streams

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from launch.flags.cli import Flags, run
def main(values):
    print("8.1 ± 0.2 — …x caf\\u00e9 \\u4e2d" + "\\n" * {lines})
sys.exit(run(Flags("launch.x", ""), main, []))
"""


def command(lines: int = 0) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(lines=lines)]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "8.1 ± 0.2 — …x café 中"),
        ("latin-1", "8.1 ± 0.2 - ...x café \\u4e2d"),
        ("ascii", "8.1 +- 0.2 - ...x caf\\xe9 \\u4e2d"),
    ],
)
def test_a_terminal_that_lacks_characters_gets_others(
    encoding: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    streams.prepare()
    print("8.1 ± 0.2 — …x café 中", end="", flush=True)
    assert raw.getvalue().decode(encoding) == text


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_command_without_a_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        done = subprocess.run(
            command(100_000), cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["0<&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_none_of_the_next_files(closed: str) -> None:
    script = f'exec "$@" {closed}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert ("8.1" in done.stdout) == ("1>" not in closed)
