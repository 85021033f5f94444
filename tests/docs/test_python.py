"""The Python code of the documentation runs."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.checkpoint.reader import open_checkpoint
from reference.pages import ROOT, code, read

pytestmark = pytest.mark.slow


def run(page: str) -> dict[str, Any]:
    """Run the blocks of a page in order, and return the names that they define."""
    names: dict[str, Any] = {}
    for block in code(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


def test_the_page_on_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("docs/python.md")
    dense, pruned = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert 1 < dense < pruned < 1.1 * dense
    for directory in ("wanda", "blocks"):
        written = open_checkpoint(tmp_path / "out" / directory)
        zeros = [np.mean(np.asarray(b.up.w) == 0) for b in written.model.blocks]
        assert np.mean(zeros) == pytest.approx(0.5, abs=0.01)
    # The last outcome is of an allocation, which removes no neurons.
    details = names["outcome"].details
    assert sum(len(kept) for kept in details.get("kept_neurons", [])) == 0
    assert len(set(details["block_sparsity"])) > 1
    of_first_call = names["sparse"].outcome.details["block_sparsity"]
    assert details["block_sparsity"] == pytest.approx(of_first_call)
    narrow, wide = (
        sum(len(block.up.w) for block in names[name].model.blocks) for name in ("smaller", "dense")
    )
    assert narrow < wide


def test_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("README.md")
    dense, pruned = map(float, capsys.readouterr().out.split())
    assert np.isfinite([dense, pruned]).all() and dense != pruned
    assert len(open_checkpoint(tmp_path / "out" / "wanda").model.blocks)


@pytest.mark.parametrize("package", ["models", "calibration", "pruning", "eval", "launch"])
def test_the_reference_lists_every_module(package: str) -> None:
    modules = {f.stem for f in (ROOT / package).glob("*.py")} - {"__init__"}
    packages = {f.parent.name for f in (ROOT / package).glob("*/__init__.py")}
    listed = re.findall(
        rf"^\| \[`{package}\.(\w+)`\]", read(f"docs/api/{package}.md"), re.MULTILINE
    )
    assert sorted(listed) == sorted(modules | packages)
