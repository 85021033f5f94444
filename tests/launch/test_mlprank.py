"""The comparison of scorers: its data, its training, the files it leaves, and what it refuses."""

import csv
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from launch import mlprank
from launch.flags import cli
from launch.mlp import images
from launch.mlp import report as mlprank_report
from launch.mlp.images import Images, Part
from launch.mlp.report import DENSE, Row
from models.errors import InputError
from pruning.structured.page_rank_core import SCORERS

SMALL = ("--hidden=12,8", "--epochs=3", "--batch=20", "--seeds=3,4", "--ratios=0.25,0.5")
SMALL += ("--learning_rate=0.01", "--calibration_samples=16")


def blobs(n: int, seed: int) -> Part:
    """Ten noisy classes of sixteen pixels, easy to tell apart."""
    centres, rng = np.random.default_rng(0).random((10, 16)), np.random.default_rng(seed)
    classes = rng.integers(0, 10, n)
    return Part(
        jnp.asarray(centres[classes] + rng.normal(0, 0.1, (n, 16)), jnp.float32),
        jnp.asarray(classes, jnp.int32),
    )


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Images:
    """Small made-up images in place of every data set."""
    made = Images(blobs(200, 1), blobs(60, 2), blobs(60, 3))
    monkeypatch.setattr(images, "load", lambda name: made)
    return made


def settings(*flags: str) -> mlprank.Settings:
    return mlprank.parse(mlprank.options().parse(flags))


def command(*flags: str) -> int:
    return cli.run(mlprank.options(), mlprank.main, flags)


# ---- data


def test_digits_parts() -> None:
    pytest.importorskip("sklearn")
    found = images.load("digits")
    assert [len(p.y) for p in found] == [1079, 359, 359]
    rows = np.concatenate([np.asarray(p.x) for p in found])
    assert rows.shape[1] == 64 and rows.min() == 0 and rows.max() == 1
    assert len({row.tobytes() for row in rows}) == len(rows), "an image is in two parts"
    for part in found:
        assert np.bincount(np.asarray(part.y), minlength=10).min() > len(part.y) / 20


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        images.load("digits")


def test_a_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    rng = np.random.default_rng(0)

    def split(n: int) -> Any:
        pixels = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
        )
        return datasets.Dataset.from_dict(
            {"image": list(pixels), "label": [i % 10 for i in range(n)]}, features=features
        ), pixels

    (train, pixels), (test, shown) = split(25), split(7)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name: {"train": train, "test": test} if name == "ylecun/mnist" else None,
    )
    monkeypatch.setattr(images, "VALID", 5)
    found = images.load("mnist")
    np.testing.assert_array_equal(
        np.rint(np.asarray(found.train.x) * 255), pixels[:20].reshape(20, -1)
    )
    np.testing.assert_array_equal(
        np.rint(np.asarray(found.valid.x) * 255), pixels[20:].reshape(5, -1)
    )
    np.testing.assert_array_equal(np.rint(np.asarray(found.test.x) * 255), shown.reshape(7, -1))
    np.testing.assert_array_equal(found.valid.y, [0, 1, 2, 3, 4])
    assert found.test.y.tolist() == list(range(7))


@pytest.mark.parametrize("name", images.HUB)
def test_the_hub_out_of_reach(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(name: str) -> Any:
        raise ConnectionError(f"no route to {name}\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=rf"--dataset={name}.*no route.*digits") as error:
        images.load(name)
    assert "\n" not in str(error.value)


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
    dense, wpr, _ = mlprank.measure(s, images.load("digits"), seed=0)
    assert dense.scorer == DENSE and min(dense.valid, dense.test) > 0.9
    assert wpr.test > 0.8
    assert (
        dense.parameters == 65 * 32 + 33 * 10 and wpr.parameters == 65 * 29 + 30 * 10
    )  # round(3.2) of 32 are gone


def test_pruned_networks_lose_accuracy_in_order(data: Images) -> None:
    s = settings(*SMALL, "--epochs=40", "--ratios=0,0.9", "--scorers=norm,random")
    wrong = data.valid._replace(
        y=(data.valid.y + 1) % 10
    )  # so that the two parts cannot be taken for one another
    dense, *pruned = mlprank.measure(s, data._replace(valid=wrong), seed=0)
    assert dense.test > 0.95 and dense.valid < 0.05
    for row in pruned:
        assert row[3:] == dense[3:] if row.ratio == 0 else row.test < dense.test - 0.2


def test_local_takes_the_same_share_of_every_layer_and_global_the_same_number(data: Images) -> None:
    def count(a: int, b: int) -> int:
        return 17 * a + (a + 1) * b + (b + 1) * 10

    local, global_ = (
        mlprank.measure(settings(*SMALL, f"--scope={scope}"), data, 0)[1:]
        for scope in ("local", "global")
    )
    for row in local:
        assert row.parameters == (count(9, 6) if row.ratio == 0.25 else count(6, 4))
    for row in global_:
        left = 15 if row.ratio == 0.25 else 10
        assert row.parameters in {count(a, left - a) for a in range(1, left)}
    assert [r.parameters for r in global_] != [r.parameters for r in local]


def test_masked_accuracy_is_counted_right(data: Images) -> None:
    params = mlprank.train(settings(*SMALL), data.train, jax.random.key(0))
    keeps = [np.arange(12) % 3 > 0, np.arange(8) % 2 > 0]
    h = np.asarray(data.test.x)
    for p, keep in zip(params[:-1], keeps, strict=True):
        h = np.maximum(h @ np.asarray(p.w).T + np.asarray(p.b), 0) * keep
    guess = np.argmax(h @ np.asarray(params[-1].w).T + np.asarray(params[-1].b), axis=-1)
    assert float(mlprank.accuracy(params, keeps, data.test)) == pytest.approx(
        np.mean(guess == np.asarray(data.test.y))
    )


def test_the_seed_is_what_differs(data: Images) -> None:
    s = settings(*SMALL, "--scorers=wpr,random")
    a, b, c = (mlprank.measure(s, data, seed) for seed in (0, 0, 1))
    assert a == b
    assert [r.test for r in a] != [r.test for r in c]


def test_diverged_training_is_an_error(data: Images) -> None:
    with pytest.raises(InputError, match="lower --learning_rate"):
        mlprank.measure(settings(*SMALL, "--learning_rate=1e30"), data, 0)


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
    ("flag", "says"),
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
def test_bad_flags(
    flag: str, says: str, data: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SMALL, f"--output={tmp_path / 'a'}", flag) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())


def test_an_output_is_needed_and_never_overwritten(
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


def test_an_output_that_cannot_be_written(
    data: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command(*SMALL, "--scorers=norm", f"--output={tmp_path / 'file' / 'a'}") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_nothing_is_left_of_a_run_that_fails(
    data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str:
        raise RuntimeError("a defect")

    monkeypatch.setattr(mlprank_report, "plot", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        command(*SMALL, "--scorers=norm", f"--output={tmp_path / 'a'}")
    assert not list(tmp_path.iterdir())


# ---- the report


@pytest.fixture
def rows() -> Callable[[dict[str, list[float]]], list[Row]]:
    """From each scorer's test accuracy at one ratio, one value a seed."""

    def make(values: dict[str, list[float]]) -> list[Row]:
        dense = [
            Row(DENSE, 0.0, seed, 1.0, 1.0, 10) for seed in range(len(next(iter(values.values()))))
        ]
        return dense + [
            Row(name, 0.3, seed, 0.5, v, 7)
            for name, tests in values.items()
            for seed, v in enumerate(tests)
        ]

    return make


def printed(rows: list[Row]) -> list[str]:
    console = Console(width=80, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(mlprank_report.table("a title", rows))
    return capture.get().splitlines()


def test_the_table_marks_the_best_of_each_line(rows: Callable[..., list[Row]]) -> None:
    lines = printed(rows({"wpr": [0.9, 0.8], "norm": [0.7, 0.7], "mpr": [0.8, 0.9]}))
    line = next(line for line in lines if "30%" in line)
    assert line.split() == ["30%", "85.0±7.1*", "70.0±0.0", "85.0±7.1*"]
    assert next(line for line in lines if "average" in line).split()[1:] == line.split()[1:]
    assert "dense 100.0±0.0" in " ".join(lines)


def test_six_scorers_fit_eighty_columns(rows: Callable[..., list[Row]]) -> None:
    lines = printed(rows({name: [0.999, 0.5] for name in SCORERS}))
    assert max(map(len, lines)) <= 80
    assert (
        len([line for line in lines if "±" in line]) == 3
    )  # the ratio, the average, the caption: no cell is broken


def test_one_seed_has_no_spread() -> None:
    assert mlprank_report.spread([0.25]) == (0.25, 0.0)
    assert mlprank_report.spread([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))
