"""LLMRank's importance along the blocks: norms of activations, then ranks of neurons."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import batch_norms
from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Block, Group, Model, linear_of
from models.programs import Program, program
from models.sharding import to_host, tree_to_host
from pruning.structured.llmrank_core import Centrality, Ffn, flow

STACK_BYTES = 2 << 30  # most weights stacked for one scan; importance is carried between scans

NORMS_KEY = "norms"  # not the scorer: all scorers have the same norms

_flow = Program(flow, "importance", static=(0, 1))


class Ranks(NamedTuple):
    """Importance of one block, on the host.

    Attributes:
      neurons: Of its neurons [f].
      channels: Of the residual channels it writes [d].
    """

    neurons: np.ndarray
    channels: np.ndarray


# Group of neurons -> activation norms of its part, by name.
PartNorms = Mapping[str, Mapping[str, np.ndarray]]


class Linears(NamedTuple):
    """Slots of the feed-forward part, or of one expert.

    Attributes:
      gates: Linears that gate the neurons: ("gate",) for LLaMA, () for OPT.
      up: Linear path into the neurons.
      down: Reader of the neurons.
    """

    gates: tuple[str, ...]
    up: str
    down: str


def linears_of(group: Group) -> Linears:
    """Return the slots of a group of neurons."""
    *gates, up = (writer.name for writer in group.writers)
    return Linears(tuple(gates), up, group.reader.name)


def measure_norms(model: Model, tokens: np.ndarray, runtime: Runtime) -> list[PartNorms]:
    """Return every block's activation norms at the inputs and outputs of up and down, by group."""
    arch, groups = model.arch, [g for g in model.arch.groups if g.kind == "neurons"]

    def taps(group: Group) -> dict[str, str]:
        names = linears_of(group)
        # Outputs too: PageRank teleports to their norms.
        return {
            "a_in": arch.tap(names.up),
            "a_up": names.up,
            "a_mid": arch.tap(names.down),
            "a_down": names.down,
        }

    # Norms over a micro-batch, then their mean: the official ranks depend on the batch.
    watch = {tap: batch_norms for group in groups for tap in taps(group).values()}

    def visit(i: int, block: Block, stats: Any) -> tuple[Block, Any]:
        norms = {name: tree_to_host(s).mean for name, s in stats.items()}
        return block, {
            group.name: {field: norms[tap] for field, tap in taps(group).items()}
            for group in arch.groups_of(block, "neurons")
        }

    return calibrate_blocks(
        model,
        tokens,
        runtime,
        visit,
        watch=watch,
        propagate="dense",  # as official: nothing is measured anew after pruning
        name="measuring activations",
        key=NORMS_KEY,
    )


def _noise(seed: int, i: int, width: int, which: int) -> jax.Array:
    """Return uniform noise [width] for block i, for the scorer "random"."""
    # A key for each block and linear: noise must not depend on how blocks are stacked.
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), 2 * i + which), (width,))


@program("feed-forward parts stacked")
def _stack(parts: Sequence[Ffn]) -> Ffn:
    """Return the parts of several blocks as one, every array stacked [blocks ...]."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


def _part(block: Block, group: Group, norms: Mapping[str, np.ndarray], seed: int, i: int) -> Ffn:
    """Return the feed-forward part of block i, or one of its experts."""
    names, s = linears_of(group), {n: jnp.asarray(x) for n, x in norms.items()}
    return Ffn(
        linear_of(block, names.up).w,
        tuple(linear_of(block, gate).w for gate in names.gates),
        linear_of(block, names.down).w,
        s["a_in"],
        s["a_up"],
        s["a_mid"],
        s["a_down"],
        _noise(seed, i, s["a_up"].shape[0], 0),
        _noise(seed, i, s["a_down"].shape[0], 1),
    )


def _stacks(stats: Sequence[PartNorms], linears: int) -> list[range]:
    """Return runs of consecutive blocks of equal widths whose weights fit in STACK_BYTES.

    A block with experts is a run of its own.
    """

    def widths(i: int) -> tuple[int, int, int]:
        norms = stats[i].get("neurons")
        if norms is None:
            return 0, 0, i
        return norms["a_up"].shape[0], norms["a_in"].shape[0], -1

    stacks = []
    for (f, d, _), equal in itertools.groupby(range(len(stats)), widths):
        blocks = list(equal)
        # 4 bytes: the scan takes |W| in float32, whatever the type of the weights.
        most = max(1, STACK_BYTES // (4 * linears * f * d)) if f else 1
        for start in range(0, len(blocks), most):
            part = blocks[start : start + most]
            stacks.append(range(part[0], part[-1] + 1))
    return stacks


def _experts_importance(
    model: Model,
    i: int,
    norms: PartNorms,
    carry: Callable[[Ffn, jax.Array], tuple[jax.Array, Ranks]],
    carried: jax.Array,
    seed: int,
) -> tuple[jax.Array, dict[str, Ranks]]:
    """Return the importance carried out of a block with experts, and each expert's ranks.

    All experts get the importance that comes in; what they give is averaged, as the residual stream
    adds up what they write.
    """
    block, ranks, out = model.blocks[i], {}, []
    for name, own in norms.items():
        part = _stack([_part(block, model.arch.group(name), own, seed, i)])
        given, (neurons, channels) = carry(part, carried)
        ranks[name] = Ranks(to_host(neurons)[0], to_host(channels)[0])
        out.append(to_host(given))
    return jnp.asarray(np.mean(out, axis=0)), ranks


def importance(
    model: Model,
    stats: Sequence[PartNorms],
    centrality: Centrality,
    backward: bool,
    seed: int,
) -> list[dict[str, Ranks]]:
    """Return every block's ranks by group, with the importance carried along all blocks."""
    group = next(g for g in model.arch.groups if g.kind == "neurons")
    stacks = _stacks(stats, len(group.writers) + 1)
    first = next(iter(stats[0].values()))["a_in"]
    # At the output every channel matters alike; at the input by its norm.
    carried: Any = np.ones_like(first) if backward else first
    ranks: dict[int, dict[str, Ranks]] = {}

    def carry(parts: Ffn, carried: jax.Array) -> tuple[jax.Array, Ranks]:
        return _flow(centrality, backward, parts, carried)

    for blocks in reversed(stacks) if backward else stacks:
        i = blocks[0]
        if "neurons" not in stats[i]:
            carried, ranks[i] = _experts_importance(model, i, stats[i], carry, carried, seed)
            continue
        parts = [_part(model.blocks[i], group, stats[i]["neurons"], seed, i) for i in blocks]
        carried, (neurons, channels) = carry(_stack(parts), carried)
        # To the host before the next stack, so that one stack at a time takes device memory.
        neurons, channels = to_host(neurons), to_host(channels)
        for k, i in enumerate(blocks):
            ranks[i] = {"neurons": Ranks(neurons[k], channels[k])}
    return [ranks[i] for i in range(len(stats))]
