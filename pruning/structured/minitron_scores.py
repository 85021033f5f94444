"""Measure activations of heads, neurons and channels of the residual stream in one pass."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calibration.digests import digest
from calibration.moments import moments
from calibration.observers import Observer, pair
from calibration.passes import BlockResult, observe, visit_blocks
from calibration.runtime import Runtime
from calibration.states import States
from calibration.unit_norms import unit_norms
from models.arch import Arch, Block, Model
from models.programs import program
from models.rescale import gain_offset
from models.sharding import to_host, tree_to_host
from models.stream import BLOCK_NORMS, BRANCHES, width_of
from pruning.structured.minitron_core import energy_of_norm, norm_gain
from pruning.structured.remove import GROUPS

KEY = "minitron"


def _energy_init(channels: int) -> jax.Array:
    return jnp.zeros(channels)


def _energy_update(state: jax.Array, x: jax.Array) -> jax.Array:
    """Add each channel's share in the sum of squares of every token of x [b t d]."""
    squares = jnp.square(x.astype(jnp.float32))
    total = jnp.sum(squares, axis=-1, keepdims=True)
    return state + jnp.sum(squares / jnp.where(total == 0, 1.0, total), axis=(0, 1))


energy_shares = Observer(_energy_init, _energy_update)
_stream_stats = pair(unit_norms(1), moments)


@program("energy of the stream")
def _add_energy(state: jax.Array, x: jax.Array) -> jax.Array:
    return _energy_update(state, x)


def stream_taps(arch: Arch, block: Block) -> tuple[str, ...]:
    """Return the taps of a block that the stream's readers read.

    Args:
      arch: Architecture.
      block: Parameters or specs of the block.
    """
    readers = (s for s in arch.slots_of(block) if s.feeds != "next")
    return tuple(dict.fromkeys(s.part_of or s.reads for s in readers))


def _watch(model: Model) -> dict[str, Observer]:
    """Return the observers of the scoring pass, for all kinds of blocks."""
    arch = model.arch
    watch: dict[str, Observer] = {}
    for group in arch.groups:
        watch[arch.tap(group.reader.name)] = unit_norms(group.reader.width)
    for slot in arch.slots:
        if slot.feeds != "next":
            watch[slot.part_of or slot.reads] = _stream_stats
    if arch.branch_norms:
        watch |= {name: energy_shares for name in BRANCHES}
    return watch


def _record(arch: Arch, block: Block, stats: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block's scores of units and statistics of the stream, on the host."""
    units = {}
    for group in (g for kind in GROUPS for g in arch.groups_of(block, kind)):
        units[group.name] = to_host(stats[arch.tap(group.reader.name)].total)
    stream = {}
    for tap in stream_taps(arch, block):
        norms, seen = (tree_to_host(s) for s in stats[tap])
        tokens = seen.second.samples * seen.length
        stream[tap] = {
            "norms": norms.total,
            "second": seen.second.total / tokens,
            "mean": seen.mean,
        }
    branches = {name: to_host(stats[name]) for name in BRANCHES if name in stats}
    return {"units": units, "stream": stream, "branches": branches if arch.branch_norms else {}}


def score_model(model: Model, tokens: np.ndarray, runtime: Runtime) -> list[dict[str, Any]]:
    """Measure the dense model in one pass.

    Args:
      model: Read one block at a time.
      tokens: Calibration windows, int [samples length].
      runtime: How to execute.

    Returns:
      By block: "units", squared scores by group; "stream", statistics of each tap that the stream's
      readers read; "branches", shares of the channels in what a norm follows; in the last block
      "final", those in the stream behind it.
    """
    watch = _watch(model)

    def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
        stats = observe(model.arch, watch, i, block, xs, onward=True)
        record = _record(model.arch, block, stats)
        if last:
            total: Any = np.zeros(width_of(model.non_block), np.float32)
            for x in xs:
                total = _add_energy(total, x)
            record["final"] = to_host(total)
        return BlockResult(block, record, propagated=True)

    name = "measuring activations"
    return visit_blocks(model, tokens, runtime, visit, name=name, key=(KEY, digest(tokens)))


def gains_of(
    arch: Arch, block: Any, record: Mapping[str, Any], keep: np.ndarray
) -> dict[str, float]:
    """Return the factor of each norm of a block with which it gives what it gave before the cut.

    Args:
      arch: Architecture.
      block: Dense parameters.
      record: Of the block, as `score_model` gives it.
      keep: Channels that stay, bool [d].
    """
    offset, gains = gain_offset(arch.config.static), {}
    for field, tap in BLOCK_NORMS.items():
        norm = getattr(block, field, None)
        if norm is None:
            continue
        if field.endswith("_out_norm"):
            gains[field] = norm_gain(record["branches"][tap].astype(np.float64), keep)
            continue
        seen = record["stream"][tap]
        gain = np.ones_like(seen["mean"]) if norm.scale is None else to_host(norm.scale) + offset
        bias = None if norm.bias is None else to_host(norm.bias)
        gains[field] = norm_gain(energy_of_norm(seen["second"], seen["mean"], gain, bias), keep)
    return gains
