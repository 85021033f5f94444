"""The file of docs/add-a-method.md, tested and run as the page shows it."""

import importlib.util
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from launch import prune
from launch.flags import cli
from models.checkpoint.reader import open_checkpoint
from pruning.methods import METHODS
from reference.pages import ROOT, code, shell_commands

pytestmark = pytest.mark.slow

PAGE = "docs/add-a-method.md"


@pytest.fixture
def ria(tmp_path: Path) -> Iterator[ModuleType]:
    """Import the page's file, and take its entry of METHODS away afterwards."""
    before = dict(METHODS)
    file = tmp_path / "ria.py"
    file.write_text("\n\n".join(code(PAGE, "python")), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("ria", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        METHODS.clear()
        METHODS.update(before)


def test_the_test_of_the_page_passes(ria: ModuleType) -> None:
    ria.test_ria_is_its_formula()


def test_a_dead_input_gives_finite_scores(ria: ModuleType) -> None:
    w = np.float32([[1, 0, 2], [3, 0, 1]])
    stats = ria.second_moment.update(ria.second_moment.init(3), np.ones((1, 4, 3), np.float32))
    assert np.isfinite(ria.score(0.5)(w, stats)).all()


@pytest.mark.parametrize(
    "more",
    [[], ["--model=embedded:tiny-opt", "--allocation=owl", "--refine=dsnot"]],
    ids=["page", "composed"],
)
def test_the_command_of_the_page_prunes(
    ria: ModuleType, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = shell_commands(PAGE)
    python, file, *flags = shlex.split(command)
    assert (python, file) == ("python", "ria.py")
    small = [
        "--calibration_samples=4",
        "--calibration_length=64",
        "--eval_length=64",
        "--eval_windows=4",
        "--mesh=data=1",
    ]
    output = tmp_path / "out"
    assert (
        cli.run(prune.options(), prune.main, [*flags, *small, *more, f"--output={output}"]) == 0
    ), capsys.readouterr().err
    report = json.loads((output / "pruning_report.json").read_text())
    assert report["method"] == "relative_importance(a=0.5)"
    assert report["sparsity"]["prunable"] == pytest.approx(0.5, abs=2e-3)
    perplexity = report["perplexity"]["embedded"]
    assert perplexity["dense"] < perplexity["pruned"] < 2 * perplexity["dense"]
    assert len(open_checkpoint(output).model.blocks)


def test_a_wrong_parameter_ends_in_an_error_that_names_it(
    ria: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model=embedded:tiny-llama", "--sparsity=0.5", f"--output={tmp_path / 'out'}"]
    assert cli.run(prune.options(), prune.main, [*argv, "--method=relative_importance(a=-1)"]) == 2
    assert "must not be negative" in capsys.readouterr().err
    assert cli.run(prune.options(), prune.main, [*argv, "--method=relative_importance(b=1)"]) == 2
    assert "has no parameter 'b'" in capsys.readouterr().err


def test_the_page_names_its_test() -> None:
    assert Path(__file__).relative_to(ROOT).as_posix() in (ROOT / PAGE).read_text(encoding="utf-8")
