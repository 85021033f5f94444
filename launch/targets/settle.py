"""Put the sparsity that meets a target into the request of a run, or of a planned one."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from calibration.journal import StepCache, write_durably
from launch.flags.dtypes import AUTO, DTYPES, stored_dtype
from launch.report import console
from launch.run.job import Job
from launch.run.resume import JOURNAL
from launch.targets.latency import LatencyTable, Stopwatch, time_models
from launch.targets.resolve import Aim, aim_at
from launch.targets.shapes import Subject
from launch.targets.sizes import Storage
from models.checkpoint.reader import Checkpoint
from models.errors import InputError
from models.processes import run_on_primary
from pruning.types import Request

FILE = "target.json"  # the search of an unfinished run, in its work directory


def subject_of(job: Job, config: Mapping[str, Any], dtype: str) -> tuple[Subject, Storage]:
    """Return what a job prunes, on shapes, and how it is stored.

    Args:
      job: The run.
      config: Contents of the dense model's `config.json`.
      dtype: Name of the type that the result is stored in.
    """
    subject = Subject(config, job.method, job.request, job.output.layout)
    return subject, Storage(dtype, job.output.pack)


def check_target(job: Job, checkpoint: Checkpoint, cache: StepCache) -> None:
    """Check before any work that a job's target of size can be met; latency is measured later.

    Args:
      job: The run.
      checkpoint: The dense model.
      cache: Keeps the answer for the other runs of this process.

    Raises:
      InputError: The target cannot be met.
    """
    if job.target is None or job.target.kind == "latency":
        return
    subject, storage = subject_of(
        job, checkpoint.config, stored_dtype(job.sources.dtype, checkpoint)
    )
    aim = aim_at(subject, job.target, storage, job.config.method)
    key = ("target", job.target, job.config.method, *storage, job.output.layout)
    cache.get_or_compute(key, lambda: aim.resolve()["sparsity"])


class Planned(NamedTuple):
    """Request of a run that is only planned.

    Attributes:
      request: The request.
      facts: The search under "target"; empty without a target.
    """

    request: Request
    facts: Mapping[str, Any]


def planned_request(job: Job, config: Mapping[str, Any], topology: str) -> Planned:
    """Return the request of a run that is only planned, with the sparsity that meets its target.

    Args:
      job: The run.
      config: Contents of the dense model's `config.json`.
      topology: Absent devices that the plan is for; empty: this machine.

    Raises:
      InputError: The target cannot be met, or would have to be measured on absent devices.
    """
    if job.target is None:
        return Planned(job.request, {})
    if job.target.kind == "latency" and topology:
        raise InputError(
            "is measured, and the devices of `topology` are not here",
            "plan it where the model will run, or give a target of size",
            field="target",
            value=job.target.text,
        )
    # Without the weights the type that the configuration names has to do.
    named = config.get("dtype") or config.get("torch_dtype")
    named = named if named in DTYPES else "float32"
    dtype = named if job.sources.dtype == AUTO else job.sources.dtype
    subject, storage = subject_of(job, config, dtype)
    record = aim_at(subject, job.target, storage, job.config.method).resolve()
    request = dataclasses.replace(job.request, sparsity=record["sparsity"])
    return Planned(request, {"target": record})


def settle(
    job: Job,
    checkpoint: Checkpoint,
    work: pathlib.Path,
    cache: StepCache | None = None,
    stopwatch: Stopwatch = time_models,
) -> tuple[Job, Aim | None]:
    """Put the sparsity that meets a job's target into its request.

    An unfinished run keeps the sparsity and the times that it began with: what is measured again
    is never quite the same.

    Args:
      job: The run.
      checkpoint: The dense model.
      work: Directory of the unfinished run.
      cache: Keeps measured times for the other runs of this process.
      stopwatch: Times models, for a target of latency.

    Returns:
      The job, and its aim; None without a target.

    Raises:
      InputError: The target cannot be met.
    """
    target, name = job.target, job.config.method
    if target is None:
        return job, None
    subject, storage = subject_of(
        job, checkpoint.config, stored_dtype(job.sources.dtype, checkpoint)
    )

    def decide() -> dict[str, Any]:
        key = [target.text, name, job.output.layout, *storage, checkpoint.config]
        path = work / FILE
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["key"] == key:
                return known["record"]
        record = aim_at(subject, target, storage, name, stopwatch, cache).resolve()
        if not (work / JOURNAL).exists():
            work.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps({"key": key, "record": record}).encode())
        return record

    record = run_on_primary(decide)
    console.show_search(record)
    table = LatencyTable.from_json(record["table"]) if "table" in record else None
    aim = Aim(subject, target, storage, name, table)
    aim.record = record
    request = dataclasses.replace(job.request, sparsity=record["sparsity"], settle=aim)
    return dataclasses.replace(job, request=request), aim
