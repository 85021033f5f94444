"""Write a run's or a sweep's figures for TensorBoard, Weights & Biases or MLflow, offline.

Each library writes its own files, and nothing is sent anywhere.
"""

import importlib.util
import itertools
import logging
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from launch.flags.cli import Flags
from launch.report import console, summary
from launch.report.block_plots import block_and_kind
from launch.report.measures import AGREEMENT
from models.errors import InputError
from models.processes import is_primary
from models.untrusted import user_path
from pruning.figures import LineSeries, from_json

PROJECT = "topiary"  # project of Weights & Biases, and experiment of MLflow
# Most entries of one call of MLflow, which its stores refuse to exceed.
_METRICS, _PARAMETERS = 1000, 100

Setting = str | float | bool
Points = Sequence[tuple[int, float]]  # (step, value)


class Record(NamedTuple):
    """Figures of a run or of a sweep.

    Attributes:
      name: Name of the run.
      settings: Values of the flags.
      values: Final figures by name.
      series: Figures by name that have a value at each step: a block or a trial.
    """

    name: str
    settings: Mapping[str, Setting]
    values: Mapping[str, float]
    series: Mapping[str, Points]


class Tracker(NamedTuple):
    """Library to write with, and the place for its files.

    Attributes:
      library: Key of LIBRARIES.
      directory: Directory for the library's files.
    """

    library: str
    directory: pathlib.Path


def track_flag(f: Flags) -> None:
    """Define `--track`.

    Args:
      f: Flags of a command.
    """
    f.group("Tracking")
    f.string(
        "track",
        "",
        f"write the figures for {', '.join(LIBRARIES)}, offline: tensorboard:DIR and so on",
    )


def parse_tracker(text: str) -> Tracker | None:
    """Return the tracker that a flag names, or None for an empty one.

    Args:
      text: Value of --track, such as "tensorboard:runs".

    Raises:
      InputError: The value is not LIBRARY:DIR, the package is missing, or DIR is a file.
    """
    if not text:
        return None
    library, _, name = text.partition(":")
    if library not in LIBRARIES or not name:
        choices = ", ".join(f"{known}:DIR" for known in LIBRARIES)
        raise InputError("is not a tracker", f"give {choices}", field="track", value=text)
    packages = LIBRARIES[library].packages
    missing = [install for package, install in packages.items() if not _installed(package)]
    if missing:
        raise InputError(
            f"needs the package {missing[0]}",
            f"pip install {' '.join(missing)}",
            field="track",
            value=text,
        )
    directory = user_path(name, "track")
    if directory.exists() and not directory.is_dir():
        raise InputError(
            "names a file, not a directory", "choose another DIR", field="track", value=text
        )
    return Tracker(library, directory)


def _installed(package: str) -> bool:
    """Return True if a package can be imported."""
    spec = importlib.util.find_spec(package)
    # A folder `wandb`, which offline runs leave, is found too, but has no origin.
    return spec is not None and spec.origin is not None


def write(tracker: Tracker | None, record: Callable[[], Record]) -> None:
    """Write a record from the primary process; a failure is printed and ends nothing.

    Args:
      tracker: The tracker; None writes nothing.
      record: Makes the record.
    """
    if tracker is None or not is_primary():
        return
    try:
        tracker.directory.mkdir(parents=True, exist_ok=True)
        LIBRARIES[tracker.library].write(tracker.directory, record())
    except Exception as e:  # the finished result is worth more than its record
        reason = (str(e).splitlines() or [""])[0]
        console.note(f"warning: --track wrote no record ({type(e).__name__}: {reason})")


def of_run(report: Mapping[str, Any]) -> Record:
    """Return the record of a run.

    Args:
      report: Its whole report, as `launch.prune.prune` returns it.
    """
    settings = report["settings"]
    name = pathlib.Path(settings.get("output") or report["method"]).name
    values = dict(_values(report))
    return Record(name, _settings(settings), _by_key(values), _by_key(_series(report)))


def of_sweep(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Record:
    """Return the record of a sweep, whose steps are its trials in order.

    Args:
      settings: Values of the sweep's flags.
      rows: A row per trial, as `launch.report.sweep_table` makes them.
    """
    named = {f"trial {k}": row["trial"] for k, row in enumerate(rows)}
    values = {
        f"trials/{state}": float(sum(row["state"] == state for row in rows))
        for state in ("finished", "failed", "waiting", "left out")
    }
    labels = summary.short_names(
        key.partition(":")[2] for row in rows for key in row if key.startswith("perplexity")
    )
    series: dict[str, list[tuple[int, float]]] = {}
    for k, row in enumerate(rows):
        for key, value in row.items():
            kind, colon, data = key.partition(":")
            if not isinstance(value, int | float) or key == "seed":
                continue
            figure = f"{kind.replace('_', ' ')}/{labels.get(data, data)}" if colon else kind
            series.setdefault(figure, []).append((k, float(value)))
    name = pathlib.Path(str(settings["output"])).name
    return Record(name, _settings(settings) | named, _by_key(values), _by_key(series))


def _settings(settings: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the settings that have a value."""
    known = {k: v for k, v in settings.items() if v is not None and k not in ("debug", "help")}
    return {k: v if isinstance(v, str | int | float) else str(v) for k, v in known.items()}


def _values(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the final figures of a report."""
    perplexity = report.get("perplexity", {})
    labels = summary.short_names(perplexity)
    for data, scores in perplexity.items():
        for model in ("dense", "pruned"):
            if scores.get(model) is not None:
                yield f"perplexity/{labels[data]}/{model}", scores[model]
        for m in AGREEMENT:
            if (value := m.of(report, data)) is not None:
                yield f"agreement/{labels[data]}/{m.key}", value
    for metric in summary.metrics(report.get("tasks", {})):
        for model in ("dense", "pruned"):
            if measured := metric.of(model):
                yield f"tasks/{metric.task}/{metric.name}/{model}", measured[0]
    for part in ("sparsity", "parameters", "bytes", "seconds", "peak_memory_bytes"):
        for name, value in report.get(part, {}).items():
            if isinstance(value, int | float):
                yield f"{part}/{name}", float(value)


def _series(report: Mapping[str, Any]) -> dict[str, Points]:
    """Return the figures by block: sparsity, median of the scores, and the method's own lines."""
    series: dict[str, list[tuple[int, float]]] = {}
    per_linear = {
        "sparsity": report["sparsity"].get("per_linear", {}),
        "median score": {name: quantiles[2] for name, quantiles in _quantiles(report).items()},
    }
    for figure, by_linear in per_linear.items():
        for name, value in by_linear.items():
            if place := block_and_kind(name):
                series.setdefault(f"{figure}/{place[1]}", []).append((place[0], value))
    lines = [from_json(fields) for fields in report.get("figures") or ()]
    for line in lines:
        if isinstance(line, LineSeries):
            for name, line_values in line.series.items():
                points = _points(line.x, line_values)
                if points:
                    series[f"{line.title}/{name}"] = points
    return {name: sorted(points) for name, points in series.items()}


def _quantiles(report: Mapping[str, Any]) -> Mapping[str, Sequence[float]]:
    return (report.get("scores") or {}).get("per_linear", {})


def _points(x: Sequence[float] | None, values: Sequence[float | None]) -> list[tuple[int, float]]:
    """Return a line's points; its steps are x where that is whole numbers, else 0, 1, 2, …."""
    whole = x is not None and all(float(step).is_integer() for step in x)
    steps = [int(step) for step in x] if x is not None and whole else range(len(values))
    return [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]


def _by_key(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures under names that every library takes."""
    return {re.sub(r"[^\w./ -]+", "_", name): value for name, value in figures.items()}


def _write_tensorboard(directory: pathlib.Path, record: Record) -> None:
    """Write an event file into a new directory of the run's name, settings as hyperparameters."""
    from tensorboardX import SummaryWriter
    from tensorboardX.summary import hparams

    # It warns of figures that are not finite, as those of a collapsed model are.
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)
    names = itertools.chain([record.name], (f"{record.name}-{k}" for k in itertools.count(2)))
    place = next(path for path in map(directory.joinpath, names) if not path.exists())
    with SummaryWriter(logdir=str(place)) as writer:
        for part in hparams(dict(record.settings), dict(record.values)):
            writer.file_writer.add_summary(part)
        for name, value in record.values.items():
            writer.add_scalar(name, value, 0)
        for name, points in record.series.items():
            for step, value in points:
                writer.add_scalar(name, value, step)


def _write_wandb(directory: pathlib.Path, record: Record) -> None:
    """Write a run of Weights & Biases in its offline mode; `wandb sync` would upload it."""
    # Read when the package is imported: without it, its own errors are sent to its makers.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    run = wandb.init(
        mode="offline",
        dir=str(directory),
        project=PROJECT,
        name=record.name,
        config=dict(record.settings),
        settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
    )
    run.define_metric("step")
    by_step: dict[int, dict[str, float]] = {}
    for name, points in record.series.items():
        run.define_metric(name, step_metric="step")
        for step, value in points:
            by_step.setdefault(step, {})[name] = value
    for step, values in sorted(by_step.items()):
        run.log({"step": step, **values})
    run.summary.update(dict(record.values))
    run.finish()
    # Another process writes the file, and may still be at it when `finish` returns.
    wandb.teardown()


def _write_mlflow(directory: pathlib.Path, record: Record) -> None:
    """Write a run into a database of MLflow's in the directory."""
    # Read when the package is imported: without it, its makers count its use.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    directory = directory.resolve()
    client = MlflowClient(tracking_uri=f"sqlite:///{directory / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(PROJECT)
    if experiment is None:
        files = (directory / "artifacts").as_uri()
        place = client.create_experiment(PROJECT, artifact_location=files)
    else:
        place = experiment.experiment_id
    run = client.create_run(place, run_name=record.name).info.run_id
    now = int(time.time() * 1000)
    points = [(name, value, 0) for name, value in record.values.items()]
    points += [(name, v, step) for name, line in record.series.items() for step, v in line]
    metrics = [Metric(name, value, now, step) for name, value, step in points]
    parameters = [Param(name, str(value)) for name, value in record.settings.items()]
    for chunk in _chunks(metrics, _METRICS):
        client.log_batch(run, metrics=chunk)
    for chunk in _chunks(parameters, _PARAMETERS):
        client.log_batch(run, params=chunk)
    client.set_terminated(run)


def _chunks(items: Sequence[Any], length: int) -> Iterator[Sequence[Any]]:
    """Yield the items in runs of at most `length`."""
    for k in range(math.ceil(len(items) / length)):
        yield items[k * length : (k + 1) * length]


class Library(NamedTuple):
    """A tracking library.

    Attributes:
      packages: What it needs: names to import, and what to install for them.
      write: Writes a record into a directory.
    """

    packages: Mapping[str, str]
    write: Callable[[pathlib.Path, Record], None]


LIBRARIES = {
    "tensorboard": Library({"tensorboardX": "tensorboardX"}, _write_tensorboard),
    "wandb": Library({"wandb": "wandb"}, _write_wandb),
    "mlflow": Library(
        # The small MLflow, and what its database needs; it refuses to begin a store of plain files.
        {"mlflow": "mlflow-skinny", "sqlalchemy": "sqlalchemy", "alembic": "alembic"},
        _write_mlflow,
    ),
}
