"""Plan a run before any work: memory, operations, and collectives, also for absent TPUs.

The plan is the run's own code, followed on shapes; no weights are read.

python -m launch.plan --flagfile=configs/sparsegpt.flags
python -m launch.plan --model=llama-2-70b --method=sparsegpt --sparsity=0.5 --dtype=bfloat16 \
  --topology=v5e:16x16 --mesh=data=16,model=16
"""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from calibration.generated import memory_needed
from calibration.mixtures import check_parts, parse_parts
from calibration.states import Offload, available_memory
from eval.peak import flops_per_second
from launch import prune
from launch.flags.cli import Flags, frozen, run
from launch.flags.common import offload_for, window_length
from launch.flags.compilation import OFF, compilation_cache
from launch.flags.dtypes import compute_dtype
from launch.report import summary
from launch.report.console import show_search
from launch.run import recovered_run
from launch.run.job import Job, RunConfig, resolve
from launch.run.measure import model_origin, write_report
from launch.targets.settle import planned_request
from models.arch import Model
from models.checkpoint import hub
from models.checkpoint.blocks import ShapeBlocks
from models.checkpoint.reader import abstract, open_checkpoint, read_config
from models.checkpoint.writer import SHARD_BYTES
from models.costs import Cost
from models.errors import InputError
from models.families import hf
from models.programs import Recorder, record_programs
from models.published import MODELS
from models.sharding import make_mesh

HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB a chip, as Google Cloud's pages state them


def options() -> Flags:
    """Return the flags of `launch.prune` with those of the plan."""
    f = prune.options()
    f.command, f.doc = "launch.plan", __doc__ or ""
    f.group("Plan")
    f.string(
        "topology",
        "",
        "TPUs to compile for, such as v5e:4x4 or v6e:4x4 (needs libtpu, no TPU); "
        "empty: this machine",
    )
    f.string("json", None, "file to write the plan to")
    return f


class ModelConfig(NamedTuple):
    """A model's configuration, and its origin.

    Attributes:
      config: Contents of its `config.json`.
      origin: Its repository and commit as the report's `protocol` has them; empty if it does not
        come from the hub.
    """

    config: dict[str, Any]
    origin: dict[str, Any]


def config_of(name: str | None) -> ModelConfig:
    """Read a model's configuration; no weights need be there.

    Args:
      name: Name of a published model, a directory with a config.json, a `.gguf` file, or a hub id.

    Raises:
      InputError: There is no such model.
    """
    known = {n.lower(): m.config for n, m in MODELS.items()}
    if not name:
        raise InputError(
            "is missing",
            f"give a directory with a config.json, or one of {', '.join(known)}",
            field="model",
        )
    if name.lower() in known:
        return ModelConfig(dict(known[name.lower()]), {})
    path = hub.resolve(name, weights=False)
    config = open_checkpoint(path).config if path.is_file() else read_config(path)
    return ModelConfig(config, model_origin(path))


def devices_of(topology: str) -> list[Any]:
    """Return the devices of a TPU topology, which may be absent, or the local ones.

    Args:
      topology: Such as v5e:4x4; empty for this machine.

    Raises:
      InputError: There is no such topology, or libtpu is missing.
    """
    if not topology:
        return list(jax.local_devices())
    from jax.experimental import topologies

    # Without a TPU there is no metadata server to ask, no other host, and nothing to lock.
    absent = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any type will do: the topology decides
    }
    for name, value in absent.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as e:  # the plugin raises errors of many kinds
        raise InputError(
            f"is not available ({str(e).splitlines()[0]})",
            "give one such as v5e:4x4, and pip install 'jax[tpu]'",
            field="topology",
            value=topology,
        ) from None


def tokens_shape(config: RunConfig, model: dict[str, Any]) -> tuple[int, int]:
    """Return samples and length of the calibration windows.

    Args:
      config: Settings of the run; a token file has its own shape.
      model: Configuration of the model, for the default length.
    """
    # Without a name the windows are drawn from text, whatever the model.
    parts = parse_parts(config.calibration or "embedded")
    length = window_length(config.calibration_length, model)
    return check_parts(parts, config.calibration_samples, length)


def _bytes(tree: Any) -> int:
    """Return the bytes of a tree of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _memory(topology: str) -> dict[str, int]:
    """Return the bytes that the run will have, of one device and of the host."""
    if not topology:
        return available_memory()
    return available_memory() | {"device": HBM.get(topology.partition(":")[0], 0) << 30}


def _resident(
    recorder: Recorder, offload: Offload, block: int, parameters: int, draws: int, writing: int
) -> dict[str, Any]:
    """Return the bytes that the run takes of one device, the host and the disk.

    Args:
      recorder: Record of the planned run.
      offload: Where hidden states between two blocks lie.
      block: Bytes of the largest block.
      parameters: Bytes of all parameters.
      draws: Calibration draws; the model of a further one is on the disk beside the first.
      writing: Bytes of one device that the model takes while it writes windows; 0 if it does not.
    """
    available = recorder.memory
    host = {"block_read_ahead": block, "shard_being_written": SHARD_BYTES}
    disk = {
        "output_at_most": parameters * (2 if draws > 1 else 1),
        "hidden_states": recorder.peak["disk"],
    }
    return {
        "offload": offload,
        "device": {
            "peak": max(recorder.peak["device"], writing),
            "writing_windows": writing,
            "available": available["device"],
        },
        "host": {
            **host,
            "arrays": recorder.peak["host"],
            "peak": sum(host.values()) + recorder.peak["host"],
            "available": available["host"],
        },
        "disk": disk,
    }


def _writing(job: Job, blocks: Any, leaves: Sequence[Any], mesh: Mesh, length: int) -> int:
    """Return the bytes of one device that a model takes to write windows of a length, or 0."""
    if not job.sources.calibration.generated:
        return 0
    parameters = sum(math.prod(x.shape) for x in leaves)
    return memory_needed(blocks, parameters, leaves[0].dtype.itemsize, length, mesh)


def _fits(memory: Mapping[str, Any], devices: int, costs: Sequence[Cost]) -> bool:
    """Return whether every program compiles and all memories hold what the run puts there."""
    if any(cost.failed for cost in costs):
        return False
    device, host = memory["device"], memory["host"]
    if device["available"]:
        return device["peak"] <= device["available"] and host["peak"] <= host["available"]
    # Devices without memory of their own, such as a CPU's, share the host's.
    return device["peak"] * devices + host["peak"] <= host["available"]


def _total(costs: Sequence[Cost], device_bytes: int, rate: float) -> dict[str, float]:
    """Return the whole run's work, the bytes each device moves, and the seconds of compilation.

    With a rate in FLOPs per second, 0 if it is unknown, also the seconds that the work takes.
    """
    total = {
        "device_bytes": device_bytes,
        "flops": sum(c.flops * c.calls for c in costs),
        "bytes_moved": sum(c.bytes * c.calls for c in costs),
        "compile_seconds": sum(c.seconds for c in costs),
    }
    return total | ({"seconds_at_peak": total["flops"] / rate} if rate else {})


def plan(values: dict[str, Any]) -> dict[str, Any]:
    """Return the plan as JSON.

    The method itself runs, on shapes: see `models.programs`.

    Args:
      values: Flags by name.

    Raises:
      InputError: The run would be refused before it begins.
    """
    config, topology = frozen(RunConfig, values), values["topology"]
    job = resolve(dataclasses.replace(config, mesh="" if topology else config.mesh))
    method, runtime = job.method, job.runtime
    devices = devices_of(topology)
    mesh = make_mesh(config.mesh, runtime.batch, devices)
    model_config, origin = config_of(job.sources.model)
    arch, non_block, blocks = hf.specs(model_config)
    dtype = compute_dtype(config.dtype)
    shapes = abstract(arch, non_block, blocks, dtype)
    model = Model(arch, shapes.non_block, ShapeBlocks(blocks, dtype))
    request, target = planned_request(job, model_config, topology)
    method.check(model, request)
    tokens = np.zeros(tokens_shape(config, model_config), np.int32)
    recovered_run.check(job, model, len(tokens))
    x = jax.eval_shape(arch.embed, shapes.non_block, tokens)
    memory = _memory(topology)
    offload = offload_for(config.activations, x, mesh, memory)
    runtime = dataclasses.replace(runtime, mesh=mesh, offload=offload)
    recorder = Recorder(mesh, memory)
    with record_programs(recorder):
        recovered_run.plan_run(job, model, tokens, request, runtime)
    draws = config.calibration_draws
    costs = [cost._replace(calls=cost.calls * draws) for cost in recorder.costs]
    parameters = jax.tree.leaves((shapes.non_block, shapes.blocks))
    block = max(_bytes(b) for b in shapes.blocks)
    writing = _writing(job, shapes.blocks, parameters, mesh, tokens.shape[1])
    resident = _resident(recorder, offload, block, _bytes(parameters), draws, writing)
    resident["disk"]["hidden_states"] += _bytes(x)  # saved for a run that goes on
    rate = 0.0 if topology else flops_per_second(dtype) * mesh.size
    total = _total(costs, resident["device"]["peak"], rate)
    return {
        "model": config.model,
        "method": config.method,
        "protocol": origin,
        "parameters": sum(math.prod(s.shape) for s in parameters),
        "devices": {"kind": devices[0].device_kind, "topology": topology, "mesh": dict(mesh.shape)},
        "calibration": {
            "samples": tokens.shape[0],
            "length": tokens.shape[1],
            "batch": runtime.batch,
            "draws": draws,
        },
        "programs": [cost._asdict() for cost in costs],
        "memory": resident,
        "total": total,
        "fits": _fits(resident, mesh.size, costs),
        **target,
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the plan as a table and a few lines.

    Args:
      result: `plan`'s.
      console: Where to print.
    """
    if "target" in result:
        show_search(result["target"], console)
    devices, total, memory = result["devices"], result["total"], result["memory"]
    where = devices["topology"] or devices["kind"]
    mesh = ", ".join(f"{axis} {n}" for axis, n in devices["mesh"].items())
    title = f"{result['model']}, {result['method']} on {where} ({mesh})"
    table = Table(title=title, title_justify="left")
    for heading in ("program", "calls", "GFLOP a call", "peak memory", "collectives", "compiled"):
        is_text = heading in ("program", "collectives")
        justify: Literal["left", "right"] = "left" if is_text else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for p in result["programs"]:
        table.add_row(
            p["name"],
            summary.count(p["calls"]),
            f"{p['flops'] / 1e9:,.3g}",
            p["failed"] or summary.size(p["peak"]),
            ", ".join(f"{n} {kind}" for kind, n in p["collectives"].items()),
            f"{p['seconds']:.1f} s",
        )
    console.print(table)
    for place, name in {"device": "each device", "host": "host", "disk": "disk"}.items():
        parts = [
            f"{key.replace('_', ' ')} {summary.size(n)}" for key, n in memory[place].items() if n
        ]
        console.print(f"{name}: {', '.join(parts)}", soft_wrap=True)
    console.print(f"hidden states between two blocks: {memory['offload']}", soft_wrap=True)
    verdict = "it fits" if result["fits"] else "it does not fit"
    console.print(f"peak of one device {summary.size(total['device_bytes'])}: {verdict}")
    work = f"work: {total['flops'] / 1e12:,.3g} TFLOP"
    if "seconds_at_peak" in total:
        work += f", {summary.duration(total['seconds_at_peak'])} at the measured peak"
    console.print(f"{work}; each device moves {summary.size(int(total['bytes_moved']))}")
    if memory["device"]["writing_windows"]:
        console.print(
            "writing the calibration windows: its memory is counted, its work is not",
            soft_wrap=True,
        )


def main(values: dict[str, Any]) -> None:
    """Print the plan, and write it to a file if `--json` names one."""
    # Programs of absent devices are written to the cache but cannot be read again: JAX would warn.
    with compilation_cache(OFF if values["topology"] else None):
        result = plan(values)
    show(result, Console())
    if values["json"]:
        write_report(values["json"], result)


if __name__ == "__main__":
    sys.exit(run(options(), main))
