"""Assemble the report of a run."""

import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eval.size import peak_memory
from launch.flags.dtypes import compute_dtype
from launch.flags.protocols import stamp
from launch.report import removal, summary
from launch.run import draws, export, formats
from launch.run.inputs import Inputs
from launch.run.job import Job
from launch.run.measure import model_origin, protocol
from launch.targets.resolve import Aim
from models.checkpoint.reader import Checkpoint
from pruning.figures import to_json
from pruning.types import Outcome

# An output with this many times the source's bytes for each parameter has a wider type.
WIDER = 1.2


class Recovery(NamedTuple):
    """Recovery of a run's pruned model.

    Attributes:
      measured: Measurements of the recovered model, as those of the pruned one.
      record: The report's `recovery`.
      figures: Plots and tables for the report, JSON-able.
      warnings: Sentences that the report's reader must see.
      notes: Sentences that a reader may want to know, and need not act on.
    """

    measured: Mapping[str, Any]
    record: Mapping[str, Any]
    figures: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]
    notes: Sequence[str]


class Results(NamedTuple):
    """Everything that a run has computed and measured.

    Attributes:
      outcome: Result of the method.
      written: The pruned checkpoint, loaded back; the recovered one where there is one.
      counts: Weights by linear.
      parameters: Parameters of the pruned model, padding not counted.
      dense: Measurements of the dense model: "perplexity" by data set, "tasks" by task.
      pruned: The same of the pruned model, and "agreement" with the dense one by data set.
      further_draws: `draws.record` of each draw but the first.
      remarks: Sentences about the files of the checkpoint that its reader must see.
      recovery: Recovery of the pruned model; None without one.
    """

    outcome: Outcome
    written: export.Written
    counts: removal.LinearCounts
    parameters: int
    dense: Mapping[str, Any]
    pruned: Mapping[str, Any]
    further_draws: list[dict[str, Any]]
    remarks: Sequence[str] = ()
    recovery: Recovery | None = None


def describe(job: Job, inputs: Inputs, results: Results, command: str) -> dict[str, Any]:
    """Return the report, without its seconds and samples.

    Args:
      job: The run.
      inputs: What it has read.
      results: What it has computed.
      command: Command that repeats the run.
    """
    checkpoint, outcome, written = inputs.checkpoint, results.outcome, results.written
    target, done = _target(job, outcome), results.recovery
    settings = dataclasses.asdict(job.config) | {"sparsity": target}
    sparsity = removal.sparsity(checkpoint, outcome, results.counts, checkpoint.parameters, target)
    # A target in other units says itself whether it was met.
    compared = sparsity | {"target": None} if job.target else sparsity
    types = _types(job, inputs, results)
    warnings = [
        *_type_warnings(types, checkpoint, written),
        *formats.warnings(written.other_formats, written.loaded.config, types["stored"]),
        *_warnings(inputs, results, compared),
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": job.config.model,
        "method": job.config.method,
        "settings": settings,
        "command": command,
        "protocol": stamp(job.config.protocol, settings)
        | {"calibration": _calibration(job, inputs)}
        | model_origin(checkpoint.directory)
        | protocol(inputs.data, inputs.zero_shot),
        "sparsity": sparsity,
        "parameters": {"dense": checkpoint.parameters, "pruned": results.parameters},
        "bytes": {"dense": checkpoint.stored_bytes, "pruned": written.loaded.stored_bytes},
        "dtype": types,
        **measures_of(results.dense, results.pruned, done and done.measured),
        **_draws(inputs, results),
        "peak_memory_bytes": peak_memory(jax.local_devices()),
        "scores": removal.score_quantiles(checkpoint, outcome),
        "warnings": warnings,
        "notes": [*outcome.notes, *(done.notes if done else ()), *removal.notes(written)],
        **checks_of(written),
        "figures": [*map(to_json, outcome.figures), *(done.figures if done else ())],
        "details": _details(inputs, outcome),
        **({"recovery": done.record} if done else {}),
    }


def checks_of(written: export.Written) -> dict[str, Any]:
    """Return what a report says of the written files: formats, how they load, and the checks.

    Args:
      written: The checkpoint, loaded back.
    """
    return {
        "other_formats": dict(written.other_formats),
        "loads_as": written.form.label,
        "loading": _loading(written),
        "checks": {
            "topiary": written.topiary.result,
            "transformers": written.transformers.result,
        },
        "load_back": _load_back(written),
    }


def _loading(written: export.Written) -> dict[str, Any]:
    """Return the report's `loading`: what transformers makes of the checkpoint."""
    config = written.form.config
    return {
        "class": config["architectures"][0],
        "model_type": config["model_type"],
        "trust_remote_code": written.form.code is not None,
        "tokenizer": any(written.loaded.directory.glob("tokenizer*")),
    }


def _load_back(written: export.Written) -> dict[str, str]:
    """Return how the checkpoint and the GGUF file read back, in words."""
    results = {"topiary": written.topiary.message, "transformers": written.transformers.message}
    gguf = written.other_formats.get("gguf")
    return results | ({"gguf": gguf["load_back"]} if gguf else {})


def _calibration(job: Job, inputs: Inputs) -> dict[str, Any]:
    """Return what the report's `protocol` says about calibration."""
    reason = job.sources.calibration.reason
    return inputs.calibration.protocol | ({"chosen": reason} if reason else {})


def _target(job: Job, outcome: Outcome) -> float:
    """Return the sparsity that the run aimed at."""
    if isinstance(job.request.settle, Aim):
        return float(job.request.settle.record["sparsity"])
    if job.method.sets_sparsity:
        # The method's arguments give all linears the same fraction.
        return next(iter(outcome.asked[0].values()))
    return job.request.sparsity


def _types(job: Job, inputs: Inputs, results: Results) -> dict[str, str]:
    """Return the report's `dtype`: type of the source, of the computation and of the output."""
    return {
        "source": inputs.checkpoint.dtype,
        "computed": str(jnp.dtype(compute_dtype(job.config.dtype))),
        "stored": results.written.loaded.config["dtype"],
    }


def _warnings(inputs: Inputs, results: Results, sparsity: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know of the files, of what was removed, and of the method."""
    checkpoint, outcome = inputs.checkpoint, results.outcome
    window = inputs.calibration.ids.shape[1]
    return [
        *checkpoint.remarks,
        *results.remarks,
        *removal.warnings(sparsity, results.written, checkpoint, window),
        *removal.linear_warnings(outcome, results.counts, checkpoint),
        *outcome.warnings,
        *(results.recovery.warnings if results.recovery else ()),
        *inputs.calibration.warnings,
    ]


def _type_warnings(
    types: Mapping[str, str], checkpoint: Checkpoint, written: export.Written
) -> Iterator[str]:
    """Yield what to know where the output takes more bytes for a parameter than the source."""
    # Of the numbers alone: the headers of small files would count as a wider type.
    whole = jnp.dtype(types["stored"]).itemsize * checkpoint.parameters
    if whole <= WIDER * checkpoint.stored_bytes:
        return
    kept = f"; --dtype=auto keeps {types['source']}" if types["source"] != types["stored"] else ""
    yield (
        f"the output stores {types['stored']}, {whole / checkpoint.stored_bytes:.1f} times the "
        f"source's bytes for each parameter: its files take "
        f"{summary.size(written.loaded.stored_bytes)}, the source's "
        f"{summary.size(checkpoint.stored_bytes)}{kept}"
    )


def measures_of(
    dense: Mapping[str, Any], pruned: Mapping[str, Any], recovered: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the report's `perplexity`, `agreement` and `tasks`.

    Args:
      dense: Measurements of the dense model, as `Results.dense`.
      pruned: Those of the pruned model.
      recovered: Those of the recovered model; None without one.
    """
    models = {"dense": dense, "pruned": pruned} | ({"recovered": recovered} if recovered else {})
    perplexity = {
        name: {
            **{model: m["perplexity"][name]["perplexity"] for model, m in models.items()},
            **{f"{model}_stderr": m["perplexity"][name]["error"] for model, m in models.items()},
            "tokens": found["tokens"],
        }
        for name, found in dense["perplexity"].items()
    }
    agreement = pruned["agreement"]
    if recovered:
        own = recovered["agreement"]
        agreement = {name: {**found, "recovered": own[name]} for name, found in agreement.items()}
    tasks = {
        name: {model: m["tasks"][name] for model, m in models.items()} for name in pruned["tasks"]
    }
    return {"perplexity": perplexity, "agreement": agreement, "tasks": tasks}


def _draws(inputs: Inputs, results: Results) -> dict[str, Any]:
    """Return the report's `draws` and `spread`; empty for a run with one draw."""
    if not results.further_draws:
        return {}
    records = [draws.record(inputs.calibration, results.pruned), *results.further_draws]
    return {"draws": records, "spread": draws.spread(records)}


def _details(inputs: Inputs, outcome: Outcome) -> dict[str, Any]:
    """Return the report's `details`: the method's own, and the removed units by linear."""
    removed = export.by_linear(
        inputs.checkpoint.specs, outcome.removed, lambda r: list(r.rows or r.columns)
    )
    details = dict(outcome.details)
    if removed:
        details["removed"] = removed
    return details
