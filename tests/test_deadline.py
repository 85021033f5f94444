"""A deadline skips tests that have not begun, and files of many tests come last."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = ["tests/models/test_layers.py", "tests/test_deadline.py"]


def run(*flags: str, deadline: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-rs", *flags],
        cwd=ROOT,
        env={**os.environ, "TOPIARY_TEST_DEADLINE": deadline},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(("deadline", "skipped"), [("0", True), ("inf", False)])
def test_tests_that_begin_after_the_deadline_are_skipped(deadline: str, skipped: bool) -> None:
    said = run("tests/models/test_layers.py", "-k", "norms", deadline=deadline)
    assert ("the time for tests is over" in said) == skipped
    assert ("passed" not in said) == skipped


def test_files_of_many_tests_come_last() -> None:
    listed = run("--collect-only", *FILES, deadline="inf").splitlines()
    first, last = (next(k for k, x in enumerate(listed) if name in x) for name in FILES[::-1])
    assert first < last
