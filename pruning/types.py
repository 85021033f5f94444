"""Core types shared by all pruning methods.

A method is a frozen configuration with a pure `run`: it reads a model and calibration tokens, hands
finished blocks to a sink one after the other, and returns an `Outcome`. It never changes its input,
so the dense model is still there for another trial.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from calibration.observers import Observer
from calibration.runtime import Runtime
from models.arch import Arch, Block, Model, NonBlockParams
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from pruning.figures import Figure
from pruning.weights.patterns_core import Mask as Mask
from pruning.weights.patterns_core import Pattern as Pattern

BlockSink = Callable[[int, Block], None]  # (index, finished block)
# The statistics of an expert that saw fewer calibration tokens are noise: it is pruned without.
FEW_TOKENS = 32
# (sparsity -> units that stay, bool [units] by block and group) -> the sparsity to take.
Settle = Callable[[Callable[[float], Sequence[Mapping[str, np.ndarray]]]], float]
Budget = tuple[Mapping[str, np.ndarray], ...]  # by block: slot -> fraction to remove, () or [out]


def unprepared(stats: Any) -> tuple[Any, Mapping[str, jax.Array]]:
    """Return the statistics as they are, without figures for the report."""
    return stats, {}


class Pruner(NamedTuple):
    """A layer-wise rule: the input statistics it needs, and how it prunes linears sharing an input.

    Attributes:
      observer: Observer of the input; None if no statistics are needed.
      solve: (W [out in] of each linear, prepared statistics, count of each as `Pattern.counts`
        gives it) -> (W [out in], kept bool [out in]) of each.
      prepare: statistics -> (what `solve` needs of them, figures for the report by name, float32
        ()). Runs once for each input; a module-level or cached function, so that inputs of equal
        width share a compilation.
    """

    observer: Observer | None
    solve: Callable[
        [Sequence[jax.Array], Any, Sequence[jax.Array]], Sequence[tuple[jax.Array, Mask]]
    ]
    prepare: Callable[[Any], tuple[Any, Mapping[str, jax.Array]]] = unprepared


class Layerwise(NamedTuple):
    """The rule and pattern that a method prunes linears with; allocators try budgets with them."""

    pruner: Pruner
    pattern: Pattern


class Allocation(NamedTuple):
    """A budget over the model.

    Attributes:
      budget: By block: slot -> fraction to remove.
      details: Figures for the report, JSON-able.
      warnings: Sentences that the report's reader must see.
      figures: Plots and tables for the report.
    """

    budget: Budget
    details: Mapping[str, Any] = {}
    warnings: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()


class Allocator(Protocol):
    """Spread the requested sparsity over the model's blocks, linears or rows."""

    @property
    def reads_activations(self) -> bool:
        """Return whether the budget depends on the calibration windows."""

    def __call__(
        self,
        model: Model,
        tokens: np.ndarray,
        request: "Request",
        runtime: Runtime,
        layerwise: Layerwise,
    ) -> Allocation:
        """Return a budget whose mean over all weights is the request's sparsity."""


class Refiner(Protocol):
    """Improve the finished mask of each linear."""

    @property
    def reads_activations(self) -> bool:
        """Return whether the masks depend on the calibration windows."""

    def __call__(self, arch: Arch, pruners: Mapping[str, Pruner]) -> Mapping[str, Pruner]:
        """Return, for every tap, a pruner that also refines its masks."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Request that a run makes of a method.

    Attributes:
      sparsity: Fraction to remove, 0 <= s < 1, of the parameters that the method covers.
      pattern: (n, m) for n zeros in every m consecutive inputs; None for unstructured.
      allocation: Spreads the sparsity over the model, for methods that take one; None: evenly.
      refine: Improves the mask of each linear, for methods that prune each on its own.
      seed: Seed of everything random.
      settle: Chooses the sparsity when a method of units has its scores, which decide how wide each
        block is; None: it is as requested.
    """

    sparsity: float
    pattern: tuple[int, int] | None = None
    allocation: Allocator | None = None
    refine: Refiner | None = None
    seed: int = 0
    settle: Settle | None = None

    def settled(self, choose: Callable[[float], Sequence[Mapping[str, np.ndarray]]]) -> "Request":
        """Return the request with its final sparsity.

        Args:
          choose: Sparsity -> units that stay, bool [units] by block and group.
        """
        if self.settle is None:
            return self
        return dataclasses.replace(self, sparsity=self.settle(choose), settle=None)


class Removed(NamedTuple):
    """Rows and columns removed from a linear.

    Attributes:
      rows: Indices of output rows of the original matrix.
      columns: Indices of its input columns.
      cut: Whether the shape shrinks; else the entries are zero.
    """

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a method, in terms of slots; the report maps them to tensor names.

    Attributes:
      asked: By block: slot -> fraction to remove. Absent slots are not covered by the method.
      removed: By block: slot -> Removed, for structured methods; else empty.
      scores: By block: slot -> scores, for the report's plots.
      scores_label: Name of the scores.
      details: Figures of the method, JSON-able.
      warnings: Sentences that the report's reader must see.
      notes: Sentences that a reader may want to know, and need not act on.
      kept_blocks: Original index of every finished block, for methods that remove whole blocks;
        None: all blocks stay.
      kept_experts: By block: original number of every expert that is left, None in a block without
        experts; None for methods that remove no experts.
      non_block: Parameters outside the blocks, where the method changed them; else None.
      figures: Plots and tables for the report.
    """

    asked: tuple[Mapping[str, float], ...]
    removed: tuple[Mapping[str, Removed], ...] = ()
    scores: tuple[Mapping[str, np.ndarray], ...] = ()
    scores_label: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kept_blocks: tuple[int, ...] | None = None
    kept_experts: tuple[tuple[int, ...] | None, ...] | None = None
    non_block: NonBlockParams | None = None
    figures: tuple[Figure, ...] = ()


SAME_SHAPES = ShapeChange()


class Method(Protocol):
    """A pruning method: a frozen configuration that a user names with `method`.

    A run is also followed on shapes alone, to find the request that meets a size. A method whose
    search would make that slow has `without_search(model, request) -> Method`, which removes as
    much without trying anything. One whose scores decide how wide each block is calls
    `request.settled` when it has them.
    """

    def shape_change(self, model: Model) -> ShapeChange:
        """Return how the method changes a model's shapes; reads no parameters."""

    @property
    def sets_sparsity(self) -> bool:
        """Return whether the method's own arguments set the sparsity."""

    @property
    def reads_activations(self) -> bool:
        """Return whether the result depends on the calibration windows."""

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model.

        Reads no parameters, so that it can run before any work.
        """

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model.

        Args:
          model: Read one block at a time, never changed.
          tokens: Calibration windows, int [samples length].
          request: What to remove.
          runtime: How to execute; no result depends on it.
          sink: Takes every finished block, in order.

        Returns:
          What was asked and removed, with figures for the report.
        """


def reads_activations(method: Method, request: Request) -> bool:
    """Return whether a run's result depends on the calibration windows.

    Args:
      method: What to prune with.
      request: Its allocation and refinement count too.
    """
    parts = (method, request.allocation, request.refine)
    return any(part.reads_activations for part in parts if part is not None)


def scores_key(method: Method) -> Hashable:
    """Return all that a method's scores depend on besides model and tokens.

    A method that scores the dense model alone has a property of this name; its scores serve every
    size.

    Args:
      method: What to prune with.

    Returns:
      Key of the pass that scores; None where scores depend on what was pruned before, or on no
      activations.
    """
    return getattr(method, "scores_key", None)


def dropped_indices(keep: np.ndarray) -> tuple[int, ...]:
    """Return the indices that a keep mask, bool [units], drops."""
    return tuple(int(i) for i in np.flatnonzero(~keep))


def reject_weight_settings(name: str, request: Request) -> None:
    """Raise InputError for settings that a method of whole units cannot follow.

    Args:
      name: Name of the method.
      request: Must have no pattern, allocation or refinement.
    """
    if request.pattern:
        n, m = request.pattern
        raise InputError(
            f"is for weight methods, and {name} removes whole units",
            "leave it out",
            field="pattern",
            value=f"{n}:{m}",
        )
    if request.allocation:
        raise InputError(
            f"is for weight methods, and {name} sets its own",
            "leave it out",
            field="allocation",
        )
    reject_refinement(name, request)


def reject_experts(name: str, model: Model) -> None:
    """Raise InputError for a mixture of experts, of which the authors' code knows nothing.

    Args:
      name: Name of the method.
      model: Only its architecture is read.
    """
    if model.arch.has_experts:
        raise InputError(
            f"{name}: the official code has no step for experts", 'use variant="corrected"'
        )


def reject_refinement(name: str, request: Request) -> None:
    """Raise InputError for a refinement of masks that are not made linear by linear.

    Args:
      name: Name of the method.
      request: Must have no refinement.
    """
    if request.refine:
        raise InputError(
            f"is for methods that prune each linear on its own, and {name} does not",
            "leave it out",
            field="refine",
        )


def prune(
    model: Model,
    method: Method,
    tokens: np.ndarray,
    request: Request,
    runtime: Runtime = Runtime(),  # noqa: B008, frozen
) -> tuple[Model, Outcome]:
    """Prune a model in memory.

    Args:
      model: Never changed.
      method: What to prune with.
      tokens: Calibration windows, int [samples length].
      request: What to remove.
      runtime: How to execute; no result depends on it.

    Returns:
      The pruned model, and what was removed.

    Raises:
      InputError: The method cannot follow the request on this model.
    """
    method.check(model, request)
    blocks: dict[int, Block] = {}
    outcome = method.run(model, tokens, request, runtime, blocks.__setitem__)
    non_block = outcome.non_block or model.non_block
    kept = tuple(blocks[i] for i in range(len(blocks)))
    return model._replace(non_block=non_block, blocks=kept), outcome
