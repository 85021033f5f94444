"""Score heads and neurons in a pass that also measures what a refit cannot make up for."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np

from calibration.digests import digest
from calibration.moments import moments
from calibration.observers import gram, pair
from calibration.passes import BlockResult, observe, visit_blocks
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Arch, Block, Model, linear_of
from models.programs import Program, program
from models.sharding import to_host, tree_to_host
from pruning.structured.channel_scores import (
    ChannelScore,
    DenseScores,
    by_reader,
    score_groups,
    unit_cost,
)
from pruning.structured.refit_errors_core import added_errors, comparable_errors, stream_inverse
from pruning.structured.remove import GROUPS, cost, watch_readers
from pruning.structured.unit_scores import block_units

_added_errors = Program(added_errors, "errors of refits")


@program("stream measured")
def _add_stream_inverse(x: jax.Array, total: jax.Array) -> jax.Array:
    """Add what `stream_inverse` says of a micro-batch [b t d]."""
    return total + stream_inverse(x)


def compares_errors(arch: Arch) -> bool:
    """Return whether the errors of all blocks are on one scale, as parts of one stream.

    Args:
      arch: Architecture.
    """
    # An expert's error reaches only the tokens that are routed to it.
    return arch.outputs_add and not arch.has_experts


def score_with_errors(
    model: Model,
    tokens: np.ndarray,
    runtime: Runtime,
    score: ChannelScore,
    name: str,
    key: Hashable,
) -> DenseScores:
    """Score every unit in one pass over the dense model, with the errors of refits.

    Args:
      model: Read one block at a time.
      tokens: Calibration windows, int [samples length].
      runtime: How to execute.
      score: Score of channels from the moments of a reader's input.
      name: What the progress bar says.
      key: As `calibrate_blocks` has it.
    """
    arch = model.arch
    watch = watch_readers(arch, pair(moments, gram))

    def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
        stats = observe(arch, watch, i, block, xs, onward=True)
        count = tokens.size
        # Errors add up in the stream behind the block, whose norms divide by its size.
        total: Any = np.zeros((), np.float32)
        for x in xs:
            total = _add_stream_inverse(x, total)
        inverse = float(to_host(total)) / count
        first = {tap: s[0] for tap, s in stats.items()}
        scores = score_groups(arch, block, first, score)
        means = {tap: tree_to_host(s).mean for tap, s in first.items()}
        costs = [unit_cost(arch, block, kind) for kind in GROUPS]
        errors = _errors(arch, block, stats, scores, count)
        scale = inverse * arch.branch_scale**2
        errors = {kind: values * scale for kind, values in errors.items()}
        return BlockResult(block, (scores, means, costs, errors), propagated=True)

    records = visit_blocks(
        model, tokens, runtime, visit, name=name, key=key and (key, digest(tokens))
    )
    heads, neurons = (
        [block_units(kind, scores, costs[k]) for scores, _, costs, _ in records]
        for k, kind in enumerate(GROUPS)
    )
    return DenseScores(
        heads,
        neurons,
        [by_reader(arch, scores) for scores, *_ in records],
        [means for _, means, *_ in records],
        arch.group("heads").reader.width,
        [errors for *_, errors in records],
    )


def _errors(
    arch: Arch,
    block: Block,
    stats: Mapping[str, Any],
    scores: Mapping[str, np.ndarray],
    tokens: int,
) -> dict[str, np.ndarray]:
    """Return the error of each unit by parameter that it holds, [units] by kind."""
    errors = {}
    for kind in GROUPS:
        group = arch.group(kind)
        of_channels, of_pairs = stats[arch.tap(group.reader.name)]
        linear, width = linear_of(block, group.reader.name), group.reader.width
        order = np.argsort(scores[kind].reshape(-1, width).sum(axis=1), kind="stable")
        channels = (order[:, None] * width + np.arange(width)[None, :]).reshape(-1)
        mean = tree_to_host(of_channels).mean
        added = to_host(_added_errors(linear.w, of_pairs.total, mean, np.float32(tokens), channels))
        by_unit = added.astype(np.float64).reshape(-1, width).sum(axis=1)
        errors[kind] = comparable_errors(by_unit, order) / cost(block, group)
    return errors
