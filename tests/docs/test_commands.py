"""Every command of the documentation is one that the commands take, and those of the front run."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.flags import cli
from launch.flags.calls import build
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from reference.pages import LAUNCH, ROOT, code, launch_commands, read, shell_commands

FRONT = ("README.md", "docs/index.md")  # the pages whose commands run
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "docs/**/*.md", "configs/*.flags", "notebooks/*.md", "launch/*.md")
    for path in ROOT.glob(pattern)
    if "docs/decisions" not in path.as_posix()
)
CALLS: dict[str, dict[str, Callable[..., Any]]] = {
    "method": METHODS,
    "allocation": ALLOCATIONS,
    "refine": REFINEMENTS,
}

# Commands of the front that do not run here, with the reason.
NOT_RUN = {
    "python3 -m venv .venv": "the continuous integration starts from a fresh environment",
    ".venv/bin/pip install -q -e .": "needs a package index",
    ".venv/bin/pip install -q -e '.[test]'": "needs a package index",
    ".venv/bin/pytest": "is the run that this test is part of",
    "pip install -e '.[gguf]'": "needs a package index",
}

# Words of a command that stand for something this machine lacks, and what runs in their place.
STAND_INS = {
    "meta-llama/Llama-2-7b-hf": "embedded:tiny-llama",  # the hub, and 13 GB
    "wikitext2": "embedded",  # the hub
    "DIR": "embedded:tiny-llama",  # a model of the reader's
}

# Flags that make a command small: later flags win. A whole run of the first command is a test of
# its own below.
WINDOWS = ["--eval_length=64", "--eval_windows=4"]
CALIBRATION = ["--calibration_samples=4", "--calibration_length=64", "--mesh=data=1"]
GRID = ["--methods=wanda", "--sparsities=0.5", "--allocations=uniform", "--seeds=0"]
SMALL = {
    "prune": [*CALIBRATION, *WINDOWS],
    "plan": [*CALIBRATION, *WINDOWS],
    "evaluate": WINDOWS,
    "generate": ["--new_tokens=4"],
    "bench": ["--runs=1", "--prompt_length=16", "--new_tokens=2", "--notorch"],
    "sweep": [*GRID, *CALIBRATION, *WINDOWS],
    "compare": [],
}


def stand_in(flag: str) -> str:
    """Return a flag with the words of STAND_INS replaced in its value."""
    name, equals, value = flag.partition("=")
    return name + equals + ",".join(STAND_INS.get(word, word) for word in value.split(","))


def execute(name: str, flags: Sequence[str]) -> int:
    """Run `launch.NAME` in this process and return its exit code."""
    module = importlib.import_module(f"launch.{name}")
    return cli.run(module.options(), module.main, [*map(stand_in, flags), *SMALL[name]])


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the project's flag files and a text of the reader's."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = (json.dumps({"text": "Once there was a fox. " * 40}) + "\n" for _ in range(8))
    (tmp_path / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_ones_that_the_commands_take(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # flag files are named from here
    for name, flags in launch_commands(page):
        values = importlib.import_module(f"launch.{name}").options().parse(flags)
        for flag, known in CALLS.items():
            if values.get(flag):
                build(flag, values[flag], known)


@pytest.mark.parametrize("page", FRONT)
def test_every_command_of_the_front_is_run_or_has_a_reason(page: str) -> None:
    for command in shell_commands(page):
        launched = LAUNCH.search(command)
        assert command in NOT_RUN or (launched and launched[1] in SMALL), command


@pytest.mark.parametrize("page", PAGES)
def test_the_extras_that_a_page_installs_exist(page: str) -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    for extras in re.findall(r"pip install [^`\n]*\[([\w,]+)\]", read(page)):
        missing = set(extras.split(",")) - {*project["optional-dependencies"], "tpu"}
        assert not missing, f"{page} installs {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_no_page_installs_the_other_project_of_the_name(page: str) -> None:
    assert not re.search(r"\btopiary\[|pip install topiary\b", read(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", FRONT)
def test_the_commands_of_the_front_run_one_after_the_other(
    page: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # `launch.compare out/llmrank out/flap` reads a run that the pages leave to the reader.
    assert execute("prune", ["--flagfile=configs/flap.flags"]) == 0
    for name, flags in launch_commands(page):
        assert execute(name, flags) == 0, (name, flags, capsys.readouterr().err)


@pytest.mark.slow
def test_the_first_command_prints_the_table_that_the_readme_shows(workspace: Path) -> None:
    command = [sys.executable, "-m", "launch.prune", "--flagfile=configs/llmrank.flags"]
    # As a reader's, so that the figures are the page's.
    readers = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "COLUMNS": "120"}
    environment = os.environ | readers | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    printed = {label: values for label, *values in map(cells, run.stdout.splitlines())}
    (table,) = code("README.md", "text")
    rows = [row for row in map(cells, table.splitlines()) if len(row) > 1 and row[0] in printed]
    assert len(rows) >= 5
    for label, *values in rows:
        if label == "dense" or label.startswith("Time"):  # the heading; another machine's seconds
            continue
        for ours, theirs in zip(values, printed[label], strict=True):
            wanted = pytest.approx(number(theirs), rel=1e-2, nan_ok=True)
            assert number(ours) == wanted, (label, ours, theirs)


def cells(line: str) -> list[str]:
    """Split a row of a table, as the terminal or the README has it, into its cells."""
    return [c for c in re.split(r"\s{2,}|\s*[│┃]\s*", line.strip()) if c] or [""]


def number(cell: str) -> float:
    """Return the first number of a cell, NaN without any."""
    match = re.search(r"-?\d[\d,]*\.?\d*", cell)
    return float(match[0].replace(",", "")) if match else float("nan")
