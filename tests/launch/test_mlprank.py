"""The comparison of scorers: training, pruning, the files it writes, the settings it refuses."""

import csv
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import mlprank
from launch.flags import cli
from launch.mlp import images, report
from launch.mlp.images import Images, Part
from launch.mlp.report import DENSE
from models.errors import InputError
from pruning.structured.page_rank_core import SCORERS

SMALL = ("--hidden=12,8", "--epochs=3", "--batch=20", "--seeds=3,4", "--ratios=0.25,0.5")
SMALL += ("--learning_rate=0.01", "--calibration_samples=16")


@pytest.fixture(scope="module", autouse=True)
def promoted_dtypes() -> Iterator[None]:
    """Let dtypes promote: optax's Adam mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def blobs(n: int, seed: int) -> Part:
    """Make images of sixteen pixels in ten noisy classes that are easy to tell apart."""
    centres, rng = np.random.default_rng(0).random((10, 16)), np.random.default_rng(seed)
    classes = rng.integers(0, 10, n)
    return Part(
        jnp.asarray(centres[classes] + rng.normal(0, 0.1, (n, 16)), jnp.float32),
        jnp.asarray(classes, jnp.int32),
    )


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Images:
    """Replace every data set by small made-up images."""
    made = Images(blobs(200, 1), blobs(60, 2), blobs(60, 3))
    monkeypatch.setattr(images, "load", lambda name: made)
    return made


def settings(*flags: str) -> mlprank.Settings:
    """Return the settings of flags."""
    return mlprank.parse(mlprank.options().parse(flags))


def command(*flags: str) -> int:
    """Run the command and return its exit code."""
    return cli.run(mlprank.options(), mlprank.main, flags)


# ---- training and pruning


def test_training_learns_the_digits() -> None:
    pytest.importorskip("sklearn")
    s = settings(
        "--hidden=32",
        "--epochs=15",
        "--seeds=0",
        "--scorers=wpr,random",
        "--ratios=0.1",
        "--learning_rate=0.003",
    )
    dense, wpr, _ = mlprank.evaluate_seed(s, images.load("digits"), seed=0)
    assert dense.scorer == DENSE and min(dense.valid, dense.test) > 0.9
    assert wpr.test > 0.8
    assert dense.parameters == 65 * 32 + 33 * 10
    assert wpr.parameters == 65 * 29 + 30 * 10  # round(3.2) of 32 units are removed


def test_a_higher_ratio_loses_more_accuracy(data: Images) -> None:
    s = settings(*SMALL, "--epochs=40", "--ratios=0,0.9", "--scorers=norm,random")
    # Wrong classes, so that the test fails if the two parts are exchanged.
    wrong = data.valid._replace(y=(data.valid.y + 1) % 10)
    dense, *pruned = mlprank.evaluate_seed(s, data._replace(valid=wrong), seed=0)
    assert dense.test > 0.95 and dense.valid < 0.05
    for row in pruned:
        assert row[3:] == dense[3:] if row.ratio == 0 else row.test < dense.test - 0.2


def test_local_takes_the_same_share_of_every_layer_and_global_the_same_number(data: Images) -> None:
    def count(a: int, b: int) -> int:
        return 17 * a + (a + 1) * b + (b + 1) * 10

    local, global_ = (
        mlprank.evaluate_seed(settings(*SMALL, f"--scope={scope}"), data, 0)[1:]
        for scope in ("local", "global")
    )
    for row in local:
        assert row.parameters == (count(9, 6) if row.ratio == 0.25 else count(6, 4))
    for row in global_:
        left = 15 if row.ratio == 0.25 else 10
        assert row.parameters in {count(a, left - a) for a in range(1, left)}
    assert [r.parameters for r in global_] != [r.parameters for r in local]


def test_masked_accuracy_agrees_with_numpy(data: Images) -> None:
    params = mlprank.train(settings(*SMALL), data.train, jax.random.key(0))
    keeps = [np.arange(12) % 3 > 0, np.arange(8) % 2 > 0]
    h = np.asarray(data.test.x)
    for p, keep in zip(params[:-1], keeps, strict=True):
        h = np.maximum(h @ np.asarray(p.w).T + np.asarray(p.b), 0) * keep
    guess = np.argmax(h @ np.asarray(params[-1].w).T + np.asarray(params[-1].b), axis=-1)
    assert float(mlprank.accuracy(params, keeps, data.test)) == pytest.approx(
        np.mean(guess == np.asarray(data.test.y))
    )


def test_the_seed_decides_the_rows(data: Images) -> None:
    s = settings(*SMALL, "--scorers=wpr,random")
    a, b, c = (mlprank.evaluate_seed(s, data, seed) for seed in (0, 0, 1))
    assert a == b
    assert [r.test for r in a] != [r.test for r in c]


def test_diverged_training_is_an_error(data: Images) -> None:
    with pytest.raises(
        InputError, match=r"^learning_rate=1e\+30 makes training diverge .*: lower it"
    ):
        mlprank.evaluate_seed(settings(*SMALL, "--learning_rate=1e30"), data, 0)


# ---- the command


def test_the_command_writes_its_files(
    data: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SMALL, f"--output={tmp_path / 'a'}") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SCORERS) and "16-12-8-10" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "accuracy.csv",
        "accuracy.svg",
        "results.json",
    ]

    with (tmp_path / "a" / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + len(SCORERS) * 2)
    assert {(r["scorer"], r["ratio"]) for r in rows} == {(DENSE, "0.0")} | {
        (n, q) for n in SCORERS for q in ("0.25", "0.5")
    }
    result = json.loads((tmp_path / "a" / "results.json").read_text())
    assert result["settings"]["seeds"] == [3, 4] and result["protocol"]["images"] == {
        "train": 200,
        "valid": 60,
        "test": 60,
    }
    for entry in result["pruned"]:
        own = [
            r for r in rows if (r["scorer"], float(r["ratio"])) == (entry["scorer"], entry["ratio"])
        ]
        for part in ("valid", "test"):
            values = [float(r[part]) for r in own]
            assert entry[part]["mean"] == pytest.approx(np.mean(values))
            assert entry[part]["std"] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
    assert len(result["pruned"]) == len(SCORERS) * 2
    for name, parts in result["average"].items():
        assert parts["test"]["mean"] == pytest.approx(
            np.mean([float(r["test"]) for r in rows if r["scorer"] == name])
        )

    text = " ".join(ET.parse(tmp_path / "a" / "accuracy.svg").getroot().itertext())
    assert all(name in text for name in (*SCORERS, "test accuracy", "hidden units removed"))


def test_the_command_is_reproducible(data: Images, tmp_path: Path) -> None:
    for name in "ab":
        assert (
            command(*SMALL, "--scorers=mpr,wpr(gamma=0.5,theta=1)", f"--output={tmp_path / name}")
            == 0
        )
    for file in ("accuracy.csv", "accuracy.svg"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    a, b = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    del a["seconds"], b["seconds"]
    assert a == b
    assert list(a["average"]) == ["mpr", "wpr(gamma=0.5,theta=1)"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--hidden=0,4", "widths"),
        ("--hidden=", "widths"),
        ("--ratios=0.5,1", "from 0 to below 1"),
        ("--ratios=half", "from 0 to below 1"),
        ("--ratios=nan", "from 0 to below 1"),
        ("--ratios=0.1,0.10", "once"),
        ("--seeds=-1", "from 0 on"),
        ("--seeds=1,1", "once"),
        ("--scorers=pagerank", "activation, mpr, norm, random, wanda, wpr"),
        ("--scorers=wpr(gamma=2)", "between 0 and 1"),
        ("--scorers=wpr(beta=2)", "gamma, theta"),
        ("--scorers=norm(gamma=0.5)", "no parameter"),
        ("--scorers=", "name or a call"),
        ("--learning_rate=0", "positive"),
        ("--learning_rate=nan", "positive"),
        ("--epochs=0", "epochs"),
        ("--scope=everywhere", "scope"),
        ("--dataset=cifar10", "dataset"),
        ("--batch=201", "200 training images"),
        ("--calibration_samples=201", "200 training images"),
        ("--width=3", "--help"),
    ],
)
def test_wrong_flags_are_one_line_and_write_nothing(
    flag: str, message: str, data: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SMALL, f"--output={tmp_path / 'a'}", flag) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_a_missing_or_used_output_is_refused(
    data: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SMALL) == 2
    assert "--output is missing" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    assert command(*SMALL, f"--output={tmp_path / 'a'}") == 2
    assert "exists" in capsys.readouterr().err and [f.name for f in (tmp_path / "a").iterdir()] == [
        "thesis.tex"
    ]


def test_an_output_that_cannot_be_written_is_one_line(
    data: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command(*SMALL, "--scorers=norm", f"--output={tmp_path / 'file' / 'a'}") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_run_that_fails_leaves_no_file(
    data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str:
        raise RuntimeError("a defect")

    monkeypatch.setattr(report, "plot", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        command(*SMALL, "--scorers=norm", f"--output={tmp_path / 'a'}")
    assert not list(tmp_path.iterdir())
