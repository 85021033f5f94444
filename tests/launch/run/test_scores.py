"""Scores of a run serve another size: the same bytes, without a forward; others are refused."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from launch.run.scores import FILE, read_scores, write_scores
from models.errors import InputError
from reference.prune_runs import call

STAMP = {"weights": {"model.safetensors": "ab"}, "--dtype": "float32", "--method": "('flap',)"}
RECORDS = [
    [
        {"heads": np.arange(4, dtype=np.float32)},
        {"mlp_mid": np.zeros((2, 3), np.float32)},
        [1.5, 2],
    ],
    None,
    {"name": "x", "scale": np.float32(2).reshape(())},
]
FLAGS = [
    "--model=embedded:tiny-llama",
    "--calibration_samples=2",
    "--calibration_length=16",
    "--eval_length=16",
    "--eval_windows=2",
    "--mesh=data=1",  # sums over several devices may differ in their last bit from run to run
]
METHODS = [
    "flap",
    "flap(refit=False)",
    'flap(variant="official")',
    'wanda_sp(scope="global")',
    'llmrank(scorer="mpr")',
]


def test_scores_come_back_as_they_were_written(tmp_path: pathlib.Path) -> None:
    write_scores(tmp_path, STAMP, RECORDS)
    again = read_scores(tmp_path, STAMP)
    np.testing.assert_array_equal(again[0][0]["heads"], RECORDS[0][0]["heads"])
    np.testing.assert_array_equal(again[0][1]["mlp_mid"], np.zeros((2, 3)))
    assert again[0][2] == [1.5, 2] and again[1] is None
    assert again[2]["name"] == "x" and again[2]["scale"].shape == ()


@pytest.mark.parametrize("name", list(STAMP))
def test_scores_of_something_else_are_refused(tmp_path: pathlib.Path, name: str) -> None:
    write_scores(tmp_path, STAMP, RECORDS)
    with pytest.raises(InputError, match=f"has scores of another {name.removeprefix('--')}"):
        read_scores(tmp_path, STAMP | {name: "another"})


def test_absent_and_damaged_scores_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"has no scores/scores\.safetensors"):
        read_scores(tmp_path, STAMP)
    write_scores(tmp_path, STAMP, RECORDS)
    path = tmp_path / "scores" / FILE
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            read_scores(tmp_path, STAMP)


@pytest.mark.parametrize("method", ["wanda", "wanda_sp", "magnitude_sp", "sleb(blocks=1)"])
def test_methods_that_do_not_score_the_dense_model_once_are_refused(
    method: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [*FLAGS, f"--method={method}", "--sparsity=0.3", f"--scores={tmp_path}"]
    assert call([*argv, f"--output={tmp_path / 'out'}"]) == 2
    assert "is for methods that measure the dense model once" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def _files(output: pathlib.Path) -> dict[str, bytes]:
    names = ["model.safetensors", "config.json", "pruning.json", f"scores/{FILE}"]
    return {name: (output / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.usefixtures("no_samples")
@pytest.mark.parametrize("method", METHODS)
def test_scores_of_one_size_prune_to_another(
    method: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*FLAGS, f"--method={method}"]
    first, computed, read = (tmp_path / name for name in ("first", "computed", "read"))
    assert call([*argv, "--sparsity=0.2", f"--output={first}"]) == 0
    assert call([*argv, "--sparsity=0.5", f"--output={computed}"]) == 0
    if method != "flap":  # a refit fits to what reaches each block of the pruned model

        def no_forward(*_: Any) -> None:
            raise AssertionError("a forward over the calibration text")

        monkeypatch.setattr("calibration.passes._observe", no_forward)
    scores = f"--scores={first}"
    assert call([*argv, "--sparsity=0.5", scores, f"--output={read}"]) == 0
    assert _files(read) == _files(computed) != _files(first)
    report = json.loads((read / "pruning_report.json").read_text())
    assert any("scores were read from" in note for note in report["notes"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_samples")
def test_scores_of_another_calibration_or_model_are_refused(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [*FLAGS, "--method=flap(refit=False)", "--sparsity=0.3"]
    assert call([*argv, f"--output={tmp_path / 'first'}"]) == 0
    for flag, what in (
        ("--seed=1", "calibration tokens"),
        ("--model=embedded:tiny-opt", "model configuration, weights"),
        ("--dtype=bfloat16", "dtype"),
        ('--method=flap(metric="IFV")', "method"),
    ):
        again = [*argv, flag, f"--scores={tmp_path / 'first'}", f"--output={tmp_path / 'out'}"]
        assert call(again) == 2
        assert f"has scores of another {what}: give" in capfd.readouterr().err
        assert not (tmp_path / "out").exists()
