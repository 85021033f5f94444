"""What a run will take, before any work: memory on devices, host and disk, work, collectives; for devices that are not there, too.

python -m launch.plan --flagfile=configs/sparsegpt.flags
python -m launch.plan --model=llama-2-70b --method=sparsegpt --sparsity=0.5 --topology=v5e:16x16 --mesh=data=16,model=16 --dtype=bfloat16
"""

import dataclasses
import math
import os
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from calibration.states import available_memory
from eval.peak import flops_per_second
from launch import prune
from launch.flags.cli import Flags, frozen, run
from launch.flags.common import DTYPES, offload_for, window_length
from launch.report import summary
from launch.run.job import RunConfig, request_of
from launch.run.measure import write_report
from models.arch import Model
from models.checkpoint import hub
from models.checkpoint.reader import abstract, open_checkpoint, read_config
from models.checkpoint.writer import SHARD_BYTES
from models.errors import InputError
from models.families import hf
from models.published import MODELS
from models.sharding import make_mesh, specs_on

HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB a chip, as Google Cloud's pages state them
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


def options() -> Flags:
    """The flags of `launch.prune`, with where the plan is for."""
    f = prune.options()
    f.command, f.doc = "launch.plan", __doc__ or ""
    f.group("Plan")
    f.string(
        "topology",
        "",
        "TPUs to compile for, such as v5e:4x4, v5p:2x2x2, v6e:4x4 (needs libtpu, no TPU); empty: this machine",
    )
    f.string("json", None, "file to write the plan to")
    return f


def config_of(name: str | None) -> dict[str, Any]:
    """The `config.json` of a published model by its name, a directory (which need hold nothing else), a `.gguf` file, or a hub id."""
    known = {n.lower(): m.config for n, m in MODELS.items()}
    if not name:
        raise InputError(
            f"--model is missing: give a directory with a config.json, or one of {', '.join(known)}"
        )
    if name.lower() in known:
        return dict(known[name.lower()])
    path = hub.resolve(name, weights=False)
    return open_checkpoint(path).config if path.is_file() else read_config(path)


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU topology that need not be there; the local ones for an empty text."""
    if not topology:
        return list(jax.local_devices())
    from jax.experimental import topologies

    # There is no TPU: no metadata to ask for, no other hosts, and nothing that two processes could quarrel about.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as e:  # of the plugin: whatever it has
        raise InputError(
            f"--topology={topology} cannot be had ({str(e).splitlines()[0]}): give one such as v5e:4x4, and install jax[tpu]"
        ) from None


def _shape(v: Any) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def flops(jaxpr: core.Jaxpr) -> float:
    """Floating-point operations of the matrix products of a program; loops of unknown length are counted once."""
    total = 0.0
    for eqn in jaxpr.eqns:
        shapes = [_shape(v) for v in eqn.invars]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += (
                2.0
                * math.prod(_shape(eqn.outvars[0]))
                * math.prod(shapes[0][i] for i in contracted)
            )
        inner = [flops(j) for j in core.jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


class Program(NamedTuple):
    """A compiled program of a run.

    calls: in the whole run; flops: of one call, on all devices together; bytes: that one call moves on one device, as XLA counts them
    (loops once); memory: bytes of a device that one call takes, arguments and results included; collectives: of its text, by kind;
    seconds: of compiling it; failed: why it could not be compiled, or "".
    """

    what: str
    calls: int
    flops: float
    bytes: float = 0.0
    memory: int = 0
    collectives: Mapping[str, int] = {}
    seconds: float = 0.0
    failed: str = ""


class Compiler:
    """The `run` of a rehearsal: compiles each program for the devices of a mesh and notes what that tells."""

    def __init__(self, mesh: Mesh):
        self._whole = NamedSharding(mesh, PartitionSpec())
        self.programs: list[Program] = []

    def _shape(self, x: Any) -> jax.ShapeDtypeStruct:
        return (
            x
            if isinstance(x, jax.ShapeDtypeStruct) and x.sharding
            else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole)
        )

    def __call__(self, what: str, function: Any, *args: Any, calls: int) -> Any:
        """Compile; what the function gives, as shapes where the compiler places them."""
        traced = jax.jit(function).trace(*jax.tree.map(self._shape, args))
        lowered, begin = traced.lower(), time.perf_counter()
        work = flops(traced.jaxpr.jaxpr)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            self.programs.append(
                Program(
                    what, calls, work, seconds=time.perf_counter() - begin, failed="does not fit"
                )
            )
            return jax.tree.map(self._shape, lowered.out_info)
        seconds = time.perf_counter() - begin
        m, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        size = (
            m.argument_size_in_bytes
            + m.output_size_in_bytes
            + m.temp_size_in_bytes
            - m.alias_size_in_bytes
        )
        found = dict(Counter(COLLECTIVE.findall(compiled.as_text())))
        self.programs.append(
            Program(what, calls, work, cost.get("bytes accessed", 0.0), size, found, seconds)
        )
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            lowered.out_info,
            compiled.output_shardings,
        )


def tokens_shape(config: RunConfig, model: dict[str, Any]) -> tuple[int, int]:
    """Samples and length of the calibration windows: of a token file its own, else as the flags say."""
    path = pathlib.Path(config.calibration).expanduser()
    if path.suffix == ".npy" and path.is_file():
        samples, length = np.load(path, mmap_mode="r").shape
        return samples, length
    return config.calibration_samples, window_length(config.calibration_length, model)


def _bytes(tree: Any, mesh: Mesh | None = None) -> int:
    """Of arrays, all together; or with a mesh, of one of its devices."""
    leaves = jax.tree.leaves(tree)
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if mesh else x.shape) * x.dtype.itemsize
        for x in leaves
    )


def memory_of(
    model: Model, x: jax.ShapeDtypeStruct, mesh: Mesh, topology: str, flag: str
) -> dict[str, Any]:
    """Bytes that stay all the run: on one device, on the host, on the disk; `x` are all hidden states between two blocks."""
    chip = HBM.get(topology.partition(":")[0], 0) << 30
    there = available_memory() | ({"device": chip} if topology else {})
    each, block = _bytes(x, mesh), max(_bytes(b) for b in model.blocks)
    offload = offload_for(flag, x, mesh, there)
    host = block + SHARD_BYTES + (_bytes(x) if offload == "host" else 0)
    parameters = _bytes((model.non_block, model.blocks))
    return {
        "activations": offload,
        "device": {
            "ends": _bytes(model.non_block, mesh),
            "hidden states": each if offload == "device" else 0,
            "there is": there["device"],
        },
        "host": {"read ahead, and a shard being written": host, "there is": there["host"]},
        "disk": {
            "output, at most": parameters,
            "hidden states": _bytes(x) * (2 if offload == "disk" else 1),
        },
    }


def plan(values: dict[str, Any]) -> dict[str, Any]:
    """The plan as JSON; InputError for what the run would refuse before it begins."""
    config, topology = frozen(RunConfig, values), values["topology"]
    method, request = request_of(dataclasses.replace(config, mesh="" if topology else config.mesh))
    devices = devices_of(topology)
    mesh = make_mesh(config.mesh, request.batch, devices)
    found = config_of(config.model)
    arch, non_block, blocks = hf.specs(found)
    model = abstract(arch, non_block, blocks, DTYPES[config.dtype])
    method.check(model, request)
    model = Model(arch, specs_on(model.non_block, mesh), specs_on(model.blocks, mesh))
    samples, length = tokens_shape(config, found)
    tokens = specs_on(jax.ShapeDtypeStruct((samples, length), jnp.int32), mesh, "sample")
    compiler = Compiler(mesh)
    method.rehearse(model, tokens, request, compiler)
    x = specs_on(jax.eval_shape(arch.embed, model.non_block, tokens), mesh, "sample")
    resident = memory_of(model, x, mesh, topology, config.activations)
    if config.calibration_draws > 1:
        resident["disk"]["a further draw's model, at most"] = resident["disk"]["output, at most"]
    device = resident["device"]
    programs = [p._replace(calls=p.calls * config.calibration_draws) for p in compiler.programs]
    largest = max((p.memory for p in programs), default=0)
    total = {
        "device_bytes": device["ends"] + device["hidden states"] + largest,
        "flops": sum(p.flops * p.calls for p in programs),
        "bytes_moved": sum(p.bytes * p.calls for p in programs),
        "compile_seconds": sum(p.seconds for p in programs),
    }
    fits = not any(p.failed for p in programs) and (
        not device["there is"] or total["device_bytes"] <= device["there is"]
    )
    result = {
        "model": config.model,
        "method": config.method,
        "parameters": sum(
            math.prod(s.shape) for s in jax.tree.leaves((model.non_block, model.blocks))
        ),
        "devices": {"kind": devices[0].device_kind, "topology": topology, "mesh": dict(mesh.shape)},
        "calibration": {
            "samples": samples,
            "length": length,
            "batch": request.batch,
            "draws": config.calibration_draws,
        },
        "programs": [p._asdict() for p in programs],
        "memory": resident,
        "total": total,
        "fits": fits,
    }
    if not topology:
        result["total"]["seconds_at_peak"] = total["flops"] / (
            flops_per_second(DTYPES[config.dtype]) * mesh.size
        )
    return result


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the plan as tables."""
    devices, total = result["devices"], result["total"]
    where = devices["topology"] or devices["kind"]
    mesh = ", ".join(f"{axis} {n}" for axis, n in devices["mesh"].items())
    table = Table(
        title=f"{result['model']}, {result['method']} on {where} ({mesh})", title_justify="left"
    )
    for heading in ("program", "calls", "GFLOP a call", "memory", "collectives", "compiled"):
        table.add_column(
            heading,
            justify="left" if heading in ("program", "collectives") else "right",
            overflow="fold",
        )
    for p in result["programs"]:
        kinds = ", ".join(f"{n} {kind}" for kind, n in p["collectives"].items())
        size = p["failed"] or summary.size(p["memory"])
        table.add_row(
            p["what"],
            summary.count(p["calls"]),
            f"{p['flops'] / 1e9:,.3g}",
            size,
            kinds,
            f"{p['seconds']:.1f} s",
        )
    console.print(table)
    for place in ("device", "host", "disk"):
        parts = ", ".join(
            f"{name} {summary.size(n)}" for name, n in result["memory"][place].items() if n
        )
        console.print(f"{place}: {parts}", soft_wrap=True)
    console.print(
        f"hidden states between two blocks: {result['memory']['activations']}", soft_wrap=True
    )
    console.print(
        f"a device holds at most {summary.size(total['device_bytes'])}: {'it fits' if result['fits'] else 'it does not fit'}"
    )
    seconds = (
        f", {total['seconds_at_peak']:,.0f} s at the measured peak"
        if "seconds_at_peak" in total
        else ""
    )
    console.print(
        f"work: {total['flops'] / 1e12:,.3g} TFLOP{seconds}; each device moves {summary.size(int(total['bytes_moved']))}"
    )


def main(values: dict[str, Any]) -> None:
    """Print the plan, write it where `--json` says."""
    result = plan(values)
    show(result, Console())
    if values["json"]:
        write_report(values["json"], result)


if __name__ == "__main__":
    sys.exit(run(options(), main))
