"""ADMM on one block: its linears in turn, toward what the dense block gives on the same inputs.

Linears that read one tap are solved together, on the inputs that the already pruned ones give. The
target of a linear is its output in the dense block. The last linear of a later branch also makes
good what the branches before it got wrong, where their outputs add up in the residual stream.
Experts keep their own outputs: pruned attention may route other tokens to them than dense did.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calibration.observers import Gram, gram
from calibration.passes import all_finite, observe, overflow
from calibration.states import States
from models.arch import Arch, Block, Taps, linear_of
from models.experts import expert_of
from models.precision import product
from models.programs import program
from models.sharding import to_host
from pruning.types import Pruner
from pruning.weights.admm_core import Residual, Settings, System, solve_linear
from pruning.weights.expert_tokens import with_token_counts
from pruning.weights.per_linear import Notes, figures, prepare_tap, readers, with_weights
from pruning.weights.per_linear import solve_block as solve_own


class Sums(NamedTuple):
    """Sums over tokens that the linears of one tap are solved from.

    Attributes:
      inputs: Gram matrix of the tap in the pruned block.
      residuals: What each dense linear leaves of its target; None where the tap is as in the dense
        block, so that they leave nothing.
    """

    inputs: Gram
    residuals: tuple[Residual, ...] | None


def error_sources(
    arch: Arch, solved: Sequence[str], names: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Return the slots whose errors each linear makes good: its own, and those of branches before.

    Args:
      arch: Architecture.
      solved: Slots that are pruned already.
      names: Slots to solve.

    Returns:
      For each of `names`, slots whose outputs differ from the dense block's.
    """
    feeds = {slot.name: slot.feeds for slot in arch.slots}
    # With a norm after a branch or after the sum, errors of two branches do not add up.
    before = tuple(n for n in solved if feeds[n] == "next") if arch.outputs_add else ()
    return tuple((n, *before) if feeds[n] == "next" else (n,) for n in names)


@program("residuals begun", static=(0, 1))
def _start(channels: int, rows: tuple[int, ...]) -> Sums:
    """Return sums over no tokens for linears of `rows` outputs."""
    residuals = tuple(Residual(jnp.zeros((n, channels)), jnp.zeros(())) for n in rows)
    return Sums(gram.init(channels), residuals)


# The old sums are donated: a matrix of 70B's widths would lie in memory twice.
@program("residuals", static=(0, 1, 2), donated=(6,))
def _add(
    function: Callable[[Block, jax.Array], tuple[jax.Array, Taps]],
    tap: str,
    sources: tuple[tuple[str, ...], ...],
    dense: Block,
    pruned: Block,
    x: jax.Array,
    sums: Sums,
) -> Sums:
    """Run one micro-batch through both blocks and add to the sums."""
    wanted, taps = function(dense, x)[1], function(pruned, x)[1]
    inputs = taps[tap].astype(jnp.float32)
    residuals = []
    for names, old in zip(sources, sums.residuals or (), strict=True):
        # In float32, and from the outputs of linears: the stream itself, whose largest channels are
        # thousands, would leave few digits of a bfloat16 difference.
        lacks = (wanted[n].astype(jnp.float32) - taps[n].astype(jnp.float32) for n in names)
        left = functools.reduce(jnp.add, lacks)
        cross = product("bto,bti->oi", left, inputs, precision="highest")
        residuals.append(Residual(old.cross + cross, old.square + jnp.sum(jnp.square(left))))
    return Sums(gram.update(sums.inputs, taps[tap]), tuple(residuals))


def _sum_over_tokens(
    arch: Arch,
    i: int,
    tap: str,
    sources: tuple[tuple[str, ...], ...],
    dense: Block,
    pruned: Block,
    xs: States,
) -> Sums:
    """Return the sums of one tap over a block's inputs, by micro-batch.

    Args:
      arch: Architecture.
      i: Index of the block, for messages.
      tap: The tap.
      sources: Slots whose errors each of its linears makes good.
      dense: The dense block.
      pruned: The block as far as it is pruned.
      xs: Inputs of the block [b t d].
    """
    if pruned is dense:
        return Sums(observe(arch, {tap: gram}, i, dense, xs)[tap], None)
    shapes = [linear_of(dense, names[0]).w.shape for names in sources]
    sums = _start(shapes[0][1], tuple(rows for rows, _ in shapes))
    for x in xs:
        sums = _add(arch.block, tap, sources, dense, pruned, x, sums, name=f"{tap}: residuals")
    if not all_finite(sums):
        raise overflow(i)
    return sums


@program("linears pruned", static=(0,))
def _solve(
    settings: Settings,
    system: System,
    residuals: tuple[Residual, ...] | None,
    ws: Sequence[jax.Array],
    counts: Sequence[jax.Array],
) -> tuple[list[jax.Array], jax.Array]:
    """Return the pruned matrices [out in], and the relative error of each, [matrices]."""
    all_residuals = residuals or (None,) * len(ws)
    parts = zip(ws, all_residuals, counts, strict=True)
    pruned = [solve_linear(w, system, r, n, settings) for w, r, n in parts]
    return [p.w for p in pruned], jnp.stack([p.error for p in pruned])


class PrunedBlock(NamedTuple):
    """A pruned block.

    Attributes:
      block: The block.
      errors: Slot -> squared error of its outputs over the sum of squares of their target; without
        the slots of experts.
      figures: Figures of experts: tap -> name -> value.
    """

    block: Block
    errors: dict[str, float]
    figures: dict[str, dict[str, float]]


def solve_block(
    arch: Arch,
    pruner: Pruner,
    settings: Settings,
    i: int,
    dense: Block,
    xs: States,
    counts: Mapping[str, Any],
) -> PrunedBlock:
    """Prune block i.

    Args:
      arch: Architecture.
      pruner: ADMM as a layer-wise rule, which inverts the system of each tap.
      settings: Settings of its rounds.
      i: Index of the block, for messages.
      dense: The dense block.
      xs: Its inputs [b t d] by micro-batch.
      counts: Slot -> entries to remove.

    Raises:
      InputError: The activations overflow.
    """
    solved: list[str] = []
    pruned = dense
    errors: dict[str, float] = {}
    of_experts, taps = _stages(readers(arch, counts))
    for tap, names in taps.items():
        sources = error_sources(arch, solved, names)
        sums = _sum_over_tokens(arch, i, tap, sources, dense, pruned, xs)
        system, _ = prepare_tap(pruner, sums.inputs, tap)
        ws, relative = _solve(
            settings,
            system,
            sums.residuals,
            [linear_of(dense, n).w for n in names],
            [counts[n] for n in names],
            name=f"{tap}: {', '.join(names)} pruned",
        )
        pruned = with_weights(pruned, dict(zip(names, ws, strict=True)))
        # float32 holds no more than six digits.
        errors |= {n: float(f"{e:.6g}") for n, e in zip(names, to_host(relative), strict=True)}
        solved += names
    notes: dict[str, Notes] = {}
    for stage in of_experts:
        pruned, own = _solve_experts(arch, pruner, settings, i, pruned, xs, counts, stage)
        notes |= own
    return PrunedBlock(pruned, errors, figures(i, notes))


def _stages(
    taps: Mapping[str, list[str]],
) -> tuple[list[dict[str, list[str]]], dict[str, list[str]]]:
    """Return the taps of experts, those of one stage of all experts together, and the other taps.

    Args:
      taps: Tap -> slots that read it.
    """
    stages: dict[str, dict[str, list[str]]] = {}
    for tap, names in taps.items():
        shared, expert = expert_of(tap)
        if expert is not None:
            stages.setdefault(shared, {})[tap] = names
    others = {tap: names for tap, names in taps.items() if expert_of(tap)[1] is None}
    return list(stages.values()), others


def _solve_experts(
    arch: Arch,
    pruner: Pruner,
    settings: Settings,
    i: int,
    block: Block,
    xs: States,
    counts: Mapping[str, Any],
    taps: Mapping[str, list[str]],
) -> tuple[Block, dict[str, Notes]]:
    """Prune experts at one stage toward their own outputs, and return the figures by tap.

    The pruned block routes tokens to other experts than the dense one, so that the two have no
    outputs of an expert on the same inputs.
    """
    stats = observe(arch, with_token_counts(dict.fromkeys(taps, gram)), i, block, xs)
    own_counts = {name: counts[name] for names in taps.values() for name in names}
    pruners = dict.fromkeys(taps, pruner)
    return solve_own(arch, pruners, settings.pattern, block, stats, own_counts)
