"""The Python of the documentation runs as it stands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.checkpoint.reader import open_checkpoint
from reference.pages import code


def run(page: str) -> dict[str, Any]:
    """Run the page's blocks one after the other, and return the names that they define."""
    names: dict[str, Any] = {}
    for block in code(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


def test_the_page_on_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("docs/python.md")
    dense, pruned = map(float, capsys.readouterr().out.splitlines()[1].split())
    assert 1 < dense < pruned < 1.1 * dense
    written = open_checkpoint(tmp_path / "out" / "wanda")
    assert np.mean(
        [np.mean(np.asarray(b.up.w) == 0) for b in written.model.blocks]
    ) == pytest.approx(0.5, abs=0.01)
    assert (
        sum(len(kept) for kept in names["outcome"].details.get("kept_neurons", [])) == 0
    )  # the last outcome is of an allocation
    assert len(set(names["outcome"].details["block_sparsity"])) > 1
    assert names["smaller"].blocks[0].up.w.shape[0] < names["model"].blocks[0].up.w.shape[0]


def test_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("README.md")
    dense, pruned = map(float, capsys.readouterr().out.split())
    assert np.isfinite([dense, pruned]).all() and dense != pruned
    assert len(open_checkpoint(tmp_path / "out" / "wanda").model.blocks)
