"""Narrower streams and blocks without attention through launch.prune, launch.plan and a resume."""

import json
import pathlib
from typing import Any

import pytest

from launch import plan, prune
from launch.flags.cli import frozen
from launch.run.export import RoundTripCheck
from models.arch import Block
from reference.prune_runs import call, report_of, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_samples")]

DATA = [
    "--model=embedded:tiny-llama",
    "--calibration_samples=2",
    "--calibration_length=16",
    "--mesh=data=1",
]
EVAL = ["--eval_length=16", "--eval_windows=2"]
METHODS = ["minitron(hidden=0.5)", "minitron", "two_ssp(attentions=1, windows=2)"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_with_the_same_bytes_and_loads_everywhere(
    method: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*DATA, *EVAL, f"--method={method}", "--sparsity=0.6"]
    assert call([*argv, f"--output={tmp_path / 'whole'}"]) == 0
    put = RoundTripCheck.put

    def stopping(self: RoundTripCheck, i: int, block: Block) -> None:
        if i == 3:
            raise KeyboardInterrupt
        put(self, i, block)

    monkeypatch.setattr(RoundTripCheck, "put", stopping)
    again = [*argv, f"--output={tmp_path / 'again'}"]
    with pytest.raises(KeyboardInterrupt):
        prune.prune(frozen(prune.RunConfig, prune.options().parse(again)))
    monkeypatch.setattr(RoundTripCheck, "put", put)
    assert call(again) == 0
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    report = report_of(tmp_path / "whole")
    assert report["checks"]["topiary"] is True and report["checks"]["transformers"] is not False
    assert abs(report["sparsity"]["prunable"] - 0.6) < 0.005
    assert not [w for w in report["warnings"] if "logits" in w or "target" in w]
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    if "hidden" in method:
        assert config["hidden_size"] == 64 == first["model.embed_tokens.weight"].shape[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_follows_the_run_on_shapes(method: str) -> None:
    argv = [*DATA, f"--method={method}", "--sparsity=0.6"]
    result: dict[str, Any] = plan.plan(plan.options().parse(argv))
    names = {p["name"] for p in result["programs"]}
    assert result["fits"] and {"statistics", "units cut", "pruned block"} <= names


def test_shares_alone_set_the_size(tmp_path: pathlib.Path) -> None:
    method = "--method=minitron(hidden=0.5, heads=0.5, neurons=0.5)"
    assert call([*DATA, *EVAL, method, f"--output={tmp_path / 'out'}"]) == 0
    report = report_of(tmp_path / "out")
    assert report["sparsity"]["prunable"] == pytest.approx(report["sparsity"]["target"], abs=1e-6)
    assert report["details"]["widths"]["channels"] == 64
