"""A run's and a sweep's figures are read back with the tracking libraries' own readers."""

import importlib.util
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import prune, sweep
from launch.flags.cli import run
from launch.run import tracking
from launch.run.tracking import Record, parse_tracker
from models.errors import InputError
from pruning.figures import LineSeries, kept_map, to_json

RECORD = Record(
    "flap-0.2",
    {"method": 'flap(metric="WIFN")', "sparsity": 0.2, "resume": True},
    {"perplexity/c4/dense": 2.5, "perplexity/c4/pruned": 3.25},
    {"sparsity/mlp.up_proj": [(0, 0.25), (1, 0.5)], "loss/phase 1": [(1, 4.0)]},
)


def report() -> dict[str, Any]:
    line = LineSeries("Loss", "block", "loss", {"phase 1": [3.0, None, 2.0]})
    maps = kept_map("heads", [np.array([True, False])])
    return {
        "method": "flap",
        "settings": {"sparsity": 0.2, "output": "out/flap", "mesh": None, "resume": True},
        "perplexity": {"/data/c4.npy": {"dense": 2.5, "pruned": math.inf, "tokens": 7}},
        "tasks": {"piqa": {"dense": {"acc,none": 0.7}, "pruned": {"acc,none": 0.6}}},
        "sparsity": {
            "target": 0.2,
            "prunable": 0.25,
            "per_linear": {"model.layers.1.mlp.up_proj": 0.5, "model.layers.0.mlp.up_proj": 0.1},
        },
        "seconds": {"load": 1.5},
        "peak_memory_bytes": {"host": 5, "device": None},
        "scores": {"label": "s", "per_linear": {"model.layers.0.mlp.up_proj": [1, 2, 3, 4, 5]}},
        "figures": [to_json(line), to_json(maps)],
    }


def test_a_runs_record_has_its_figures_and_its_settings() -> None:
    assert tracking.of_run(report()) == Record(
        "flap",
        {"sparsity": 0.2, "output": "out/flap", "resume": True},
        {
            "perplexity/c4.npy/dense": 2.5,
            "perplexity/c4.npy/pruned": math.inf,
            "tasks/piqa/acc_none/dense": 0.7,
            "tasks/piqa/acc_none/pruned": 0.6,
            "sparsity/target": 0.2,
            "sparsity/prunable": 0.25,
            "seconds/load": 1.5,
            "peak_memory_bytes/host": 5.0,
        },
        {
            "sparsity/mlp.up_proj": [(0, 0.1), (1, 0.5)],
            "median score/mlp.up_proj": [(0, 3)],
            "Loss/phase 1": [(0, 3.0), (2, 2.0)],
        },
    )


def test_a_sweeps_record_has_a_step_for_each_trial() -> None:
    done = {"state": "finished", "sparsity": 0.5, "seed": 3, "seconds": 2.0, "perplexity:a/c4": 7.5}
    rows = [
        {"trial": "wanda-0.3-seed0", "state": "failed", "sparsity": 0.3, "seed": 0},
        {"trial": "wanda-0.5-seed0", **done, "perplexity_dense:a/c4": 2.5},
    ]
    got = tracking.of_sweep({"output": "out/grid", "methods": "wanda", "debug": False}, rows)
    assert got.name == "grid"
    assert got.settings == {
        "output": "out/grid",
        "methods": "wanda",
        "trial 0": "wanda-0.3-seed0",
        "trial 1": "wanda-0.5-seed0",
    }
    assert got.values["trials/finished"] == 1 and got.values["trials/failed"] == 1
    assert got.series == {
        "sparsity": [(0, 0.3), (1, 0.5)],
        "seconds": [(1, 2.0)],
        "perplexity/c4": [(1, 7.5)],
        "perplexity dense/c4": [(1, 2.5)],
    }


@pytest.mark.slow
def test_tensorboard_reads_the_figures_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs the package tensorboardX")
    pytest.importorskip("tensorboard", reason="needs tensorboard, whose reader it is")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for _ in range(2):  # a second run of the same name has a place of its own
        tracking.LIBRARIES["tensorboard"].write(tmp_path, RECORD)
    assert {path.name for path in tmp_path.iterdir()} == {"flap-0.2", "flap-0.2-2"}
    events = EventAccumulator(str(tmp_path / "flap-0.2")).Reload()
    read = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    clean = {name.replace(" ", "_"): line for name, line in RECORD.series.items()}
    assert read == {name: [(0, value)] for name, value in RECORD.values.items()} | clean
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["method"].string_value == RECORD.settings["method"]
    assert settings["sparsity"].number_value == 0.2 and settings["resume"].bool_value


def test_the_event_file_holds_every_figure(tmp_path: Path) -> None:
    """Read with tensorboardX's own messages: length, checksum, event, checksum."""
    pytest.importorskip("tensorboardX", reason="needs the package tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    tracking.LIBRARIES["tensorboard"].write(tmp_path, RECORD)
    (file,) = (tmp_path / "flap-0.2").iterdir()
    content, at, figures = file.read_bytes(), 0, {}
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                figures.setdefault(value.tag, []).append((event.step, value.simple_value))
    clean = {name.replace(" ", "_"): line for name, line in RECORD.series.items()}
    assert figures == {name: [(0, value)] for name, value in RECORD.values.items()} | clean


@pytest.mark.slow
def test_each_trial_and_the_sweep_are_tracked_once(
    trial_inputs: Path, tmp_path: Path, no_samples: None, no_transformers: None
) -> None:
    pytest.importorskip("tensorboardX", reason="needs the package tensorboardX")
    argv = [
        f"--model={trial_inputs / 'llama'}",
        f"--calibration={trial_inputs / 'calib.npy'}",
        f"--eval_data={trial_inputs / 'eval.npy'}",
        "--methods=wanda,magnitude",
        "--sparsities=0.5",
        f"--output={tmp_path / 'grid'}",
        f"--track=tensorboard:{tmp_path / 'runs'}",
    ]
    tracked = {"wanda-0.5-seed0", "magnitude-0.5-seed0", "grid"}
    assert run(sweep.options(), sweep.main, argv) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == tracked
    # Nothing is left to do: only the sweep as a whole is written again.
    assert run(sweep.options(), sweep.main, argv) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == tracked | {"grid-2"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the library's own packages
def test_mlflow_reads_the_figures_back(tmp_path: Path) -> None:
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    many = RECORD._replace(series={"loss": [(k, k / 8) for k in range(1500)]})
    for record in (RECORD, many):  # the second has more figures than one call may hold
        tracking.LIBRARIES["mlflow"].write(tmp_path, record)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'topiary'")
    long, short = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    assert short.info.run_name == RECORD.name and short.info.status == "FINISHED"
    assert short.data.params == {name: str(value) for name, value in RECORD.settings.items()}
    assert short.data.metrics.items() >= RECORD.values.items()
    line = client.get_metric_history(short.info.run_id, "sparsity/mlp.up_proj")
    assert [(m.step, m.value) for m in line] == [(0, 0.25), (1, 0.5)]
    line = client.get_metric_history(long.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in line) == many.series["loss"]


def wandb_records(path: Path) -> list[Any]:
    """Read an offline run's file: chunks of 32 KiB that hold records, or parts of them."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for another header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the library's own packages
def test_wandb_reads_the_figures_back(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs the package wandb")
    tracking.LIBRARIES["wandb"].write(tmp_path, RECORD)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file)
    (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (begun.display_name, begun.project) == ("flap-0.2", "topiary")
    config = {c.key: json.loads(c.value_json) for c in begun.config.update}
    assert config.items() >= RECORD.settings.items()
    lines = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [{k: v for k, v in line.items() if not k.startswith("_")} for line in lines] == [
        {"step": 0, "sparsity/mlp.up_proj": 0.25},
        {"step": 1, "sparsity/mlp.up_proj": 0.5, "loss/phase 1": 4.0},
    ]
    final = {
        i.key or i.nested_key[0]: json.loads(i.value_json)
        for r in records
        if r.WhichOneof("record_type") == "summary"
        for i in r.summary.update
    }
    assert final.items() >= RECORD.values.items()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("tensorboard", "give tensorboard:DIR, wandb:DIR, mlflow:DIR"),
        ("tensorboard:", "give tensorboard:DIR, wandb:DIR, mlflow:DIR"),
        ("neptune:runs", "is not a tracker"),
        ("wandb:FILE", "names a file"),
    ],
)
def test_a_wrong_value_is_refused(
    value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tracking, "_installed", lambda package: True)
    with pytest.raises(InputError, match=re.escape(says)):
        parse_tracker(value.replace("FILE", str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("library", "install"),
    [
        ("tensorboard", "pip install tensorboardX"),
        ("wandb", "pip install wandb"),
        ("mlflow", "pip install mlflow-skinny sqlalchemy alembic"),
    ],
)
@pytest.mark.parametrize("command", [prune, sweep])
def test_a_missing_package_is_named_before_any_work(
    library: str,
    install: str,
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packages, real = tracking.LIBRARIES[library].packages, importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in packages else real(name)
    )
    amount = "--sparsity=0.5" if command is prune else "--sparsities=0.5"
    argv = ["--model=/no/such", amount, f"--output={tmp_path / 'out'}", f"--track={library}:runs"]
    assert run(command.options(), command.main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --track={library}:runs needs the package") and install in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_offline_runs_leave_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not tracking._installed("only_a_folder") and tracking._installed("json")


def test_a_failure_to_write_is_printed_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    below_a_file = tracking.Tracker("tensorboard", tmp_path / "file" / "runs")
    tracking.write(below_a_file, lambda: RECORD)
    assert "warning: --track wrote no record" in capsys.readouterr().err
    tracking.write(None, lambda: pytest.fail("nothing is to be written"))
