"""Recovery by command: of a run's own pruning, of a finished output, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import plan, prune, recover
from launch.flags.cli import run
from launch.flags.recoveries import parse_recover
from launch.report import recovered as view
from launch.report import removal
from models.errors import InputError
from pruning.recovery.blocks import Blocks
from reference.prune_runs import call, report_of, weights

CALL = "blocks(steps=16,lr=0.03,batch=1)"


def test_recoveries_are_joined_with_plus() -> None:
    first, second = parse_recover(' blocks(steps=3) + blocks(unit="half")')
    assert first == ("blocks(steps=3)", Blocks(steps=3))
    assert second.recovery == Blocks(unit="half")
    assert parse_recover("none") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("block", "did you mean blocks"),
        ("blocks(stepz=3)", "has no parameter 'stepz'"),
        ("blocks(steps=3)+", "joined with +"),
        ("blocks(loss='l1')", "give one of 'mse'"),
    ],
)
def test_a_wrong_recovery_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match="recover"):
        parse_recover(text)
    with pytest.raises(InputError) as error:
        parse_recover(text)
    assert words in str(error.value)


def test_the_summary_has_a_column_for_the_recovered_model() -> None:
    scores = {"dense": 10.0, "pruned": 20.0, "recovered": 15.0, "recovered_stderr": 1.0}
    report: dict[str, Any] = {
        "perplexity": {"d": scores},
        "agreement": {
            "d": {"kl": 0.5, "kl_stderr": None, "recovered": {"kl": 0.25, "kl_stderr": None}}
        },
        "tasks": {"t": {m: {"acc": v} for m, v in zip(scores, (0.9, 0.5, 0.7), strict=False)}},
        "sparsity": {"prunable": 0.5},
    }
    assert view.final(report) is report
    assert view.headings(report) == ("dense", "pruned", "change")
    report["recovery"] = {"stages": []}
    assert view.headings(report) == ("dense", "pruned", "recovered", "change")
    rows = {row[0]: row[1:] for row in view.rows(report)}
    assert rows["Perplexity, d"] == ("10.000", "20.000", "15.000 ± 1.000", "1.500x")
    assert rows["… KL from the dense model"][1:3] == ("0.5000", "0.2500")
    assert rows["t, acc"] == ("90.00%", "50.00%", "70.00%", "-20.00 points")
    assert view.final(report)["perplexity"]["d"]["pruned"] == 15.0


def flags(inputs: Path) -> list[str]:
    return [
        f"--calibration={inputs / 'calib.npy'}",
        f"--eval_data={inputs / 'eval.npy'}",
        "--calibration_batch=2",
        "--mesh=data=1",
    ]


def recovered(inputs: Path, pruned: Path, output: Path, *more: str) -> int:
    model = [f"--model={pruned}", f"--teacher={inputs / 'llama'}", f"--output={output}"]
    argv = [*model, f"--recover={CALL}", *flags(inputs), *more]
    return run(recover.options(), recover.main, argv)


@pytest.mark.slow
@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize(
    "method",
    [
        ["--method=wanda", "--pattern=2:4"],
        ["--method=flap(structure='AL-AM')", "--sparsity=0.3"],
        ["--method=sleb(remove=[1],repair='none')"],
    ],
    ids=["wanda", "flap", "sleb"],
)
def test_a_run_recovers_as_a_finished_output_does(
    method: list[str], trial_inputs: Path, tmp_path: Path
) -> None:
    """The same bytes, the same zeros, a report of all three models, and no outdated warning."""
    model = f"--model={trial_inputs / 'llama'}"
    both, pruned, later = (tmp_path / name for name in ("both", "pruned", "later"))
    assert call([model, f"--output={pruned}", *method, *flags(trial_inputs)]) == 0
    in_one = [model, f"--output={both}", *method, f"--recover={CALL}", *flags(trial_inputs)]
    assert call(in_one) == 0
    report = report_of(pruned)
    stale = f"{removal.NOT_REPRODUCED}of the pruned checkpoint"
    report["warnings"] += [stale, "of the pruning"]
    (pruned / "pruning_report.json").write_text(json.dumps(report))
    assert recovered(trial_inputs, pruned, later) == 0
    warnings = report_of(later)["warnings"]
    assert "of the pruning" in warnings and stale not in warnings
    before, one, two = (weights(d) for d in (pruned, both, later))
    assert one.keys() == two.keys() == before.keys()
    changed = 0
    for name, w in before.items():
        assert np.array_equal(one[name], two[name])
        if w.ndim == 2 and "embed" not in name and "lm_head" not in name:
            assert np.array_equal(one[name] == 0, w == 0)
            changed += not np.array_equal(one[name], w)
    assert changed
    record = json.loads((pruned / "pruning.json").read_text())
    for output in (both, later):
        assert json.loads((output / "pruning.json").read_text()) == record
        report = report_of(output)
        (scores,) = report["perplexity"].values()
        assert {"dense", "pruned", "recovered", "recovered_stderr"} <= scores.keys()
        (agreement,) = report["agreement"].values()
        assert agreement["recovered"].keys() >= {"kl", "top1", "greedy"} & agreement.keys()
        (stage,) = report["recovery"]["stages"]
        assert stage["recover"] == CALL and stage["tokens"] > 0 and stage["seconds"] > 0
        assert report["recovery"]["zeros"]["before"] == report["recovery"]["zeros"]["after"]
        assert report["seconds"]["recover"] > 0
        assert report["settings"]["recover"] == CALL
        assert report["sparsity"] == report_of(pruned)["sparsity"]
        assert "trained towards the dense model" in (output / "README.md").read_text()
        assert "recovered" in (output / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("no_transformers", "no_samples")
def test_what_cannot_be_recovered_ends_with_one_line(
    trial_inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pruned, dense = tmp_path / "pruned", trial_inputs / "llama"
    model = f"--model={dense}"
    args = [model, f"--output={pruned}", "--method=magnitude", "--sparsity=0.5"]
    assert call([*args, *flags(trial_inputs)]) == 0

    def refused(words: str, *argv: str) -> None:
        capsys.readouterr()
        common = [f"--output={tmp_path / 'out'}", *flags(trial_inputs)]
        assert run(recover.options(), recover.main, [*argv, *common]) == 2
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
        assert len(lines) == 1 and words in lines[0], lines
        assert not (tmp_path / "out").exists()

    refused("pruning.json does not exist", model, f"--teacher={dense}")
    refused("--teacher", f"--model={pruned}")
    refused("parameters", f"--model={pruned}", "--teacher=embedded:tiny-llama")
    refused("--recover=none names no recovery", model, f"--teacher={dense}", "--recover=none")
    refused(
        "--calibration_samples=4 leaves blocks(batch=4) no windows",
        f"--model={pruned}",
        f"--teacher={dense}",
        "--recover=blocks(batch=4)",
    )
    capsys.readouterr()
    draws = [*args[:1], f"--output={tmp_path / 'draws'}", *args[2:], "--recover=blocks"]
    assert call([*draws, *flags(trial_inputs), "--calibration_draws=2"]) == 2
    assert "leave it or --recover out" in capsys.readouterr().err
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("launch.run.places.shutil.disk_usage", lambda directory: usage)
    refused("MiB free, and the result takes", f"--model={pruned}", f"--teacher={dense}")


@pytest.mark.slow
def test_the_plan_costs_a_recovery() -> None:
    args = ["--model=embedded:tiny-llama", "--method=wanda", "--sparsity=0.5"]
    args += ["--calibration_samples=8", "--calibration_length=16", f"--recover={CALL}"]
    values = plan.options().parse(args)
    with_recovery = plan.plan(values)
    without = plan.plan({**values, "recover": "none"})
    steps = [p["calls"] for p in with_recovery["programs"] if p["name"] == "recovery step"]
    assert sum(steps) == 6 * 16
    assert with_recovery["total"]["flops"] > without["total"]["flops"]
    assert prune.options().parse(args)["recover"] == CALL
