"""Prune every linear of every block on its own, in one pass over the blocks."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from calibration.observers import Observer
from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Arch, Block, Model, linear_of, with_linears
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.experts import EXPERT_TOKENS, expert_of
from models.programs import Program, program
from models.sharding import to_host
from pruning.budget import Uniform, all_shapes, mean_fractions
from pruning.types import (
    SAME_SHAPES,
    Allocation,
    BlockSink,
    Layerwise,
    Outcome,
    Pattern,
    Pruner,
    Request,
    unprepared,
)
from pruning.weights.expert_tokens import few_token_warnings, pruner_of, with_token_counts
from pruning.weights.patterns import n_of_m

Notes = Mapping[str, jax.Array]  # figures of a pruner by name, float32 ()


@program("linears pruned", static=(0,))
def _solve(
    pruner: Pruner, prepared: Any, ws: Sequence[jax.Array], counts: Sequence[jax.Array]
) -> list[jax.Array]:
    """Return the pruned matrices [out in]."""
    return [w for w, _ in pruner.solve(ws, prepared, counts)]  # jit drops what only masks need


@functools.cache
def _prepare(prepare: Callable[[Any], Any]) -> Program:
    """Return a pruner's `prepare` as a program."""
    return Program(prepare, "statistics prepared")


def prepare_tap(pruner: Pruner, stats: Any, tap: str) -> tuple[Any, Notes]:
    """Prepare the statistics of one tap for `Pruner.solve`.

    Args:
      pruner: The layer-wise rule.
      stats: Final state of its observer; None without one.
      tap: Name of the tap.

    Returns:
      Prepared statistics, and the pruner's figures.
    """
    if pruner.prepare is unprepared:  # nothing to compile
        return stats, {}
    return _prepare(pruner.prepare)(stats, name=f"{tap}: statistics prepared")


def readers(arch: Arch, names: Collection[str]) -> dict[str, list[str]]:
    """Return the slots among `names` by the tap that they read.

    Args:
      arch: Architecture.
      names: Slots to look at.
    """
    taps: dict[str, list[str]] = {}
    for slot in arch.slots:
        if slot.name in names:
            taps.setdefault(slot.reads, []).append(slot.name)  # q, k and v share one factor
    return taps


def with_weights(block: Block, ws: Mapping[str, jax.Array]) -> Block:
    """Return the block with other matrices [out in] in some slots.

    Args:
      block: Parameters.
      ws: Slot -> matrix.
    """
    return with_linears(
        block, {name: linear_of(block, name).replace(w=w) for name, w in ws.items()}
    )


def solve_block(
    arch: Arch,
    pruners: Mapping[str, Pruner],
    pattern: Pattern,
    block: Block,
    stats: Mapping[str, Any],
    counts: Mapping[str, Any],
) -> tuple[Block, dict[str, Notes]]:
    """Prune the slots in `counts`, each with the pruner of its tap.

    Args:
      arch: Architecture.
      pruners: Tap -> pruner.
      pattern: Turns scores into masks.
      block: Parameters.
      stats: Tap -> statistics.
      counts: Slot -> entries to remove, as `Pattern.counts` gives them.

    Returns:
      The pruned block, and the pruners' figures by tap.
    """
    new: dict[str, jax.Array] = {}
    notes: dict[str, Notes] = {}
    if EXPERT_TOKENS in stats:  # read back once for all experts
        stats = {**stats, EXPERT_TOKENS: to_host(stats[EXPERT_TOKENS])}
    for tap, names in readers(arch, counts).items():
        pruner, few = pruner_of(pruners, pattern, stats, tap)
        own = stats.get(tap) if pruner.observer else None
        # The names that all experts share: their programs are one in a plan.
        shown = expert_of(tap)[0]
        prepared, notes[tap] = prepare_tap(pruner, own, shown)
        notes[tap] = {**notes[tap], **few}
        dense = [linear_of(block, name).w for name in names]  # SparseGPT sweeps them as one matrix
        label = f"{shown}: {', '.join(expert_of(name)[0] for name in names)} pruned"
        pruned = _solve(pruner, prepared, dense, [counts[n] for n in names], name=label)
        new |= dict(zip(names, pruned, strict=True))
    return with_weights(block, new), notes


def unrefined(arch: Arch, pruners: Mapping[str, Pruner]) -> Mapping[str, Pruner]:
    """Return the pruners as they are."""
    return pruners


def every_tap(arch: Arch, pruner: Pruner) -> dict[str, Pruner]:
    """Return the same pruner for every tap that linears read."""
    return {slot.reads: pruner for slot in arch.slots}


def watched(pruners: Mapping[str, Pruner]) -> dict[str, Observer]:
    """Return the observers that pruners need, by tap."""
    return with_token_counts({tap: p.observer for tap, p in pruners.items() if p.observer})


def figures(i: int, notes: Mapping[str, Notes]) -> dict[str, dict[str, float]]:
    """Return a block's figures as floats: tap -> name -> value.

    Args:
      i: Index of the block, for messages.
      notes: Figures by tap.

    Raises:
      InputError: A figure is not finite, which means that a matrix could not be factored.
    """
    values: dict[str, dict[str, float]] = {}
    for tap, by_name in notes.items():
        # float32 holds no more than six digits.
        values[tap] = {name: float(f"{float(x):.6g}") for name, x in by_name.items()}
        for name, value in values[tap].items():
            if not np.isfinite(value):
                raise InputError(
                    f"block {i}, {tap}: no {name} makes its statistics solvable",
                    "use more, or other, calibration text",
                )
    return values


def by_figure(blocks: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Return every block's figures as the report has them.

    Args:
      blocks: By block: tap -> name -> value; empty where nothing was done.

    Returns:
      Name -> by block: tap -> value.
    """
    names = {name for taps in blocks for by_name in taps.values() for name in by_name}
    return {
        name: [{tap: n[name] for tap, n in taps.items() if name in n} for taps in blocks]
        for name in sorted(names)  # a set of texts has another order in every process
    }


def pattern_of(request: Request, unstructured: Pattern) -> Pattern:
    """Return the request's N:M pattern, else `unstructured`."""
    return n_of_m(*request.pattern) if request.pattern else unstructured


def check_pattern(model: Model, pattern: Pattern) -> None:
    """Raise InputError if the pattern does not divide the inputs of a linear.

    Args:
      model: Only its shapes are read.
      pattern: The pattern.
    """
    shapes = dict.fromkeys(shape for block in all_shapes(model) for shape in block.values())
    for shape in shapes:
        pattern.counts(shape, np.zeros(()))  # raises where m does not divide the inputs


def allocate(
    model: Model, tokens: np.ndarray, request: Request, runtime: Runtime, layerwise: Layerwise
) -> Allocation:
    """Return the request's allocation; an even one without it, or at sparsity 0.

    Args:
      model: The dense model.
      tokens: Calibration windows, int [samples length].
      request: What to remove.
      runtime: How to execute.
      layerwise: What linears will be pruned with.
    """
    allocator = request.allocation if request.allocation and request.sparsity else Uniform()
    return allocator(model, tokens, request, runtime, layerwise)


def counts_for(
    arch: Arch, pattern: Pattern, block: Block, fractions: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the number of entries to remove from each slot of a block.

    Args:
      arch: Architecture.
      pattern: Turns fractions into counts.
      block: Only its shapes are read.
      fractions: Slot -> fraction to remove, () or [out].
    """
    return {
        s.name: pattern.counts(linear_of(block, s.name).w.shape, fractions[s.name])
        for s in arch.slots_of(block)
    }


def counts_if_any(
    arch: Arch, pattern: Pattern, block: Block, fractions: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return `counts_for`, but nothing where all fractions are 0: such a block stays bit for bit.

    Args:
      arch: Architecture.
      pattern: Turns fractions into counts.
      block: Only its shapes are read.
      fractions: Slot -> fraction to remove, () or [out].
    """
    if not any(np.any(fraction) for fraction in fractions.values()):
        return {}
    return counts_for(arch, pattern, block, fractions)


@dataclasses.dataclass(frozen=True)
class PerLinear:
    """Method that prunes each linear on its own; each block sees the outputs of the pruned ones.

    Attributes:
      pruner: pattern -> layer-wise rule; a module-level or cached function, so that equal rules
        compile once.
      unstructured: Pattern of runs without N:M.
      warn: details of the outcome -> sentences for its warnings.
    """

    pruner: Callable[[Pattern], Pruner]
    unstructured: Pattern
    warn: Callable[[Mapping[str, Any]], Sequence[str]] = lambda details: ()

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that all shapes stay."""
        return SAME_SHAPES

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Return whether the rule has an observer; no pattern changes that."""
        return self.pruner(self.unstructured).observer is not None

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        if request.refine and request.pattern:
            raise InputError(
                "swaps weights within a whole row, which an N:M `pattern` does not allow",
                "leave one of them out",
                field="refine",
            )
        check_pattern(model, pattern_of(request, self.unstructured))

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        arch, pattern = model.arch, pattern_of(request, self.unstructured)
        pruner = self.pruner(pattern)
        layerwise = Layerwise(pruner, pattern)
        allocation = allocate(model, tokens, request, runtime, layerwise)
        refine = request.refine or unrefined
        pruners = refine(arch, every_tap(arch, pruner))  # after allocation: trials are not refined

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            record: dict[str, dict[str, float]] = {}
            counts = counts_if_any(arch, pattern, block, allocation.budget[i])
            if counts:
                block, notes = solve_block(arch, pruners, pattern, block, stats, counts)
                record = figures(i, notes)  # floats, as JSON and journals hold them
            sink(i, block)  # at once: no finished block waits in memory
            return block, record

        records = calibrate_blocks(
            model,
            tokens,
            runtime,
            visit,
            watch=watched(pruners),
            propagate="pruned",  # as in the papers: later blocks see pruned inputs
            name="pruning",
        )
        details = {**allocation.details, **by_figure(records)}
        return Outcome(
            mean_fractions(allocation.budget),
            details=details,
            warnings=(*allocation.warnings, *self.warn(details), *few_token_warnings(details)),
            figures=allocation.figures,
        )
