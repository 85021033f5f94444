"""From a layer-wise pruner to a method over a whole model: every slot of every block, in one walk."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Observer
from calibration.passes import Rehearse, rehearse_fold
from models.arch import Arch, Block, Model
from models.errors import InputError
from pruning.budget import all_shapes, uniform
from pruning.types import (
    Allocation,
    BlockSink,
    Budget,
    Layerwise,
    Mask,
    Method,
    Outcome,
    Pattern,
    Pruner,
    Request,
    as_it_is,
)
from pruning.walk import fold
from pruning.weights.patterns import n_of_m

Notes = Mapping[str, jax.Array]


@functools.cache
def scored(
    score: Callable[[jax.Array, Any], jax.Array], keep: Callable[[jax.Array, jax.Array], Mask]
) -> Callable:
    """The solver that zeroes what `keep` drops by `score` and leaves the rest as it is."""

    def solve(
        ws: Sequence[jax.Array], stats: Any, counts: Sequence[jax.Array]
    ) -> list[tuple[jax.Array, Mask]]:
        masks = [keep(score(w, stats), n) for w, n in zip(ws, counts, strict=True)]
        return [
            (jnp.where(kept, w, jnp.zeros_like(w)), kept) for w, kept in zip(ws, masks, strict=True)
        ]

    return solve


@functools.partial(jax.jit, static_argnums=0)
def _solve(
    pruner: Pruner, prepared: Any, ws: Sequence[jax.Array], counts: Sequence[jax.Array]
) -> list[jax.Array]:
    return [w for w, _ in pruner.solve(ws, prepared, counts)]


def solve_tap(
    pruner: Pruner, stats: Any, ws: Sequence[jax.Array], counts: Sequence[jax.Array]
) -> tuple[list, Notes]:
    """The linears that read one tap, pruned together: (W [out in] of each, the pruner's figures)."""
    prepared, notes = pruner.prepare(stats)
    return _solve(pruner, prepared, ws, counts), notes


def readers(arch: Arch, names: Collection[str]) -> dict[str, list[str]]:
    """The slots among `names` by the tap that they read."""
    taps: dict[str, list[str]] = {}
    for slot in arch.slots:
        if slot.name in names:
            taps.setdefault(slot.reads, []).append(slot.name)
    return taps


def with_weights(block: Block, ws: Mapping[str, jax.Array]) -> Block:
    """The block with other matrices [out in] of some slots."""
    return block.replace(**{name: getattr(block, name).replace(w=w) for name, w in ws.items()})


def solve_block(
    arch: Arch,
    pruners: Mapping[str, Pruner],
    block: Block,
    stats: Mapping[str, Any],
    counts: Mapping[str, Any],
) -> tuple[Block, dict[str, Notes]]:
    """The slots in `counts` pruned by the pruner of their tap: (the block, the pruners' figures by tap)."""
    new: dict[str, Any] = {}
    notes: dict[str, Notes] = {}
    for tap, names in readers(arch, counts).items():
        before = [getattr(block, name).w for name in names]
        after, notes[tap] = solve_tap(
            pruners[tap], stats.get(tap), before, [counts[name] for name in names]
        )
        new |= dict(zip(names, after, strict=True))
    return with_weights(block, new), notes


def unrefined(arch: Arch, pruners: Mapping[str, Pruner]) -> Mapping[str, Pruner]:
    """The pruners as they are."""
    return pruners


def every_tap(arch: Arch, pruner: Pruner) -> dict[str, Pruner]:
    """The same pruner for every tap that linears read."""
    return {slot.reads: pruner for slot in arch.slots}


def watched(pruners: Mapping[str, Pruner]) -> dict[str, Observer]:
    """What the pruners must see."""
    return {tap: p.observer for tap, p in pruners.items() if p.observer}


def figures(i: int, notes: Mapping[str, Notes]) -> dict[str, dict[str, float]]:
    """A pruner's figures of block i as floats, by tap; InputError for one that is not finite."""
    found = {
        tap: {name: float(f"{float(x):.6g}") for name, x in n.items()} for tap, n in notes.items()
    }  # float32 has no more
    for tap, n in found.items():
        for name, x in n.items():
            if not np.isfinite(x):
                raise InputError(
                    f"block {i}, {tap}: no {name} makes its statistics solvable: use more, or other, calibration text"
                )
    return found


def by_name(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Every block's figures as the report has them: for each name a list with one {tap: figure} a block, empty where nothing was done."""
    names = {name for taps in found for n in taps.values() for name in n}
    return {
        name: [{tap: n[name] for tap, n in taps.items()} for taps in found]
        for name in sorted(names)
    }


def rule_of(request: Request, unstructured: Pattern) -> Pattern:
    """The request's n:m, else `unstructured`."""
    return n_of_m(*request.pattern) if request.pattern else unstructured


def fits(model: Model, rule: Pattern) -> None:
    """InputError if the pattern does not divide the inputs of a linear."""
    for shape in dict.fromkeys(shape for shapes in all_shapes(model) for shape in shapes.values()):
        rule.counts(shape, np.zeros(()))


def allocate(
    model: Model, tokens: np.ndarray, request: Request, layerwise: Layerwise
) -> Allocation:
    """What the request's allocation gives; the same fraction of every linear without one, or where nothing is to be removed."""
    return (request.allocation if request.allocation and request.sparsity else uniform)(
        model, tokens, request, layerwise
    )


def counts_for(
    arch: Arch, rule: Pattern, block: Block, fractions: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """How many entries of each slot go."""
    return {
        s.name: rule.counts(getattr(block, s.name).w.shape, fractions[s.name]) for s in arch.slots
    }


def counts_of(
    arch: Arch, rule: Pattern, block: Block, fractions: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """`counts_for`, but empty where nothing is asked of the block: its parameters then stay bit for bit."""
    return (
        counts_for(arch, rule, block, fractions)
        if any(np.any(fraction) for fraction in fractions.values())
        else {}
    )


def asked_of(budget: Budget) -> tuple[dict[str, float], ...]:
    """A block's {slot: fraction to remove}, the mean of its rows."""
    return tuple(
        {name: float(np.mean(fraction)) for name, fraction in block.items()} for block in budget
    )


def rehearse_taps(
    arch: Arch,
    pruners: Mapping[str, Pruner],
    rule: Pattern,
    block: Block,
    stats: Mapping[str, Any],
    request: Request,
    run: Rehearse,
    calls: int,
) -> None:
    """What `solve_block` compiles for the slots that read the taps of `pruners`, told to `run`; blocks and statistics of shapes."""
    for tap, names in readers(arch, [s.name for s in arch.slots if s.reads in pruners]).items():
        pruner, ws = pruners[tap], [getattr(block, name).w for name in names]
        counts = [rule.counts(w.shape, np.asarray(request.sparsity)) for w in ws]
        prepared = stats.get(tap)
        if pruner.prepare is not as_it_is:
            prepared, _ = run(f"{tap}: statistics prepared", pruner.prepare, prepared, calls=calls)
        run(
            f"{tap}: {', '.join(names)} pruned",
            functools.partial(_solve, pruner),
            prepared,
            ws,
            counts,
            calls=calls,
        )


def per_linear(pruner: Callable[[Pattern], Pruner], unstructured: Pattern) -> Method:
    """The method that prunes each linear on its own, block after block, each block seeing what the pruned ones before it give.

    Args:
      pruner: the pruner for a pattern; made from module-level functions, so that equal ones compile once.
      unstructured: the pattern for runs without n:m.
    """

    def method(model: Model, tokens: np.ndarray, request: Request, sink: BlockSink) -> Outcome:
        arch, rule = model.arch, rule_of(request, unstructured)
        own = pruner(rule)
        allocation = allocate(model, tokens, request, Layerwise(own, rule))
        budget = allocation.budget
        pruners = (request.refine or unrefined)(arch, every_tap(arch, own))

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            found: dict[str, dict[str, float]] = {}
            if counts := counts_of(arch, rule, block, budget[i]):
                block, notes = solve_block(arch, pruners, block, stats, counts)
                found = figures(i, notes)
            sink(i, block)
            return block, found

        found = fold(
            model,
            tokens,
            request,
            visit,
            watch=watched(pruners),
            propagate="pruned",
            what="pruning",
        )
        details = {**allocation.details, **by_name(found)}
        return Outcome(asked_of(budget), details=details, warnings=allocation.warnings)

    def check(model: Model, request: Request) -> None:
        if request.refine and request.pattern:
            raise InputError(
                "--refine swaps weights of a whole row, which --pattern=N:M does not allow: leave one of them out"
            )
        fits(model, rule_of(request, unstructured))

    def rehearse(
        model: Model, tokens: jax.ShapeDtypeStruct, request: Request, run: Rehearse
    ) -> None:
        arch, rule = model.arch, rule_of(request, unstructured)
        pruners = (request.refine or unrefined)(arch, every_tap(arch, pruner(rule)))
        _, stats = rehearse_fold(
            model, tokens, run, watch=watched(pruners), propagate="pruned", batch=request.batch
        )
        rehearse_taps(arch, pruners, rule, model.blocks[0], stats, request, run, len(model.blocks))

    return Method(method, check=check, rehearse=rehearse)
