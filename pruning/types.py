"""The words the methods are written in.

A method is a function of a model and calibration tokens; it hands finished blocks to a sink one after the other and returns an Outcome.
It never mutates, so trying something is calling it, and undoing it is dropping the result.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from calibration.journal import Journal, to_serialisable
from calibration.observers import Observer
from calibration.passes import Rehearse
from calibration.states import Offload
from models.arch import Arch, Block, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError

BlockSink = Callable[[int, Block], None]  # the sink: where block i goes when it is finished
Mask = jax.Array  # bool, the shape of what it masks; True is kept
Budget = tuple[
    Mapping[str, np.ndarray], ...
]  # one a block: slot -> fraction to remove, float64 () or [out]


class Pattern(NamedTuple):
    """Which entries of a score matrix go.

    Attributes:
      counts: (shape (out, in), fraction () or [out]) -> int32 () or [out]: how many entries that is. On the host, in float64, so that
        the number does not depend on float32 rounding; passed on as data, so one compilation serves every budget.
      keep: (score [out in], count) -> bool [out in], True where the entry stays. Pure; runs under jit.
      group: m where every m consecutive inputs are chosen from on their own, else None.
      by_row: a budget may ask another fraction of every row.
    """

    counts: Callable[[tuple[int, int], np.ndarray], np.ndarray]
    keep: Callable[[jax.Array, jax.Array], Mask]
    group: int | None = None
    by_row: bool = True


def as_it_is(stats: Any) -> tuple[Any, Mapping[str, jax.Array]]:
    """Statistics that need no preparation."""
    return stats, {}


class Pruner(NamedTuple):
    """A layer-wise method: what it must know of linears' common input, and what it does with it.

    Attributes:
      observer: of the input; None: nothing need be known.
      solve: (the W [out in] that read the input, what `prepare` made of its statistics, for each W a count as Pattern.counts gives it)
        -> (W [out in], kept bool [out in]) for each.
      prepare: statistics -> (what `solve` wants of them, figures for the report: float32 [] by name). Done once for an input; compiled
        by whoever makes it, so that inputs of equal width share a compilation whatever linears read them.
    """

    observer: Observer | None
    solve: Callable[
        [Sequence[jax.Array], Any, Sequence[jax.Array]], Sequence[tuple[jax.Array, Mask]]
    ]
    prepare: Callable[[Any], tuple[Any, Mapping[str, jax.Array]]] = as_it_is


@dataclasses.dataclass(frozen=True)
class Request:
    """What a run asks of any method.

    Attributes:
      sparsity: fraction to remove, 0 <= s < 1, of the parameters the method covers.
      pattern: the semi-structured pattern (n zeros in every m inputs), or None for unstructured.
      allocation: how the sparsity is spread over the model, for the methods that take one; None: evenly.
      refine: what is done to the finished mask of each linear, for the methods that prune each on its own.
      batch: windows in one micro-batch.
      mesh: the devices they are split over.
      tier: where hidden states between two blocks are kept; no result depends on it.
      seed: of whatever is random.
      stage: (what is done, in how many steps) -> what to call after each step, for a progress bar.
      journal: where finished steps are kept for a run that is started again, or None.
    """

    sparsity: float
    pattern: tuple[int, int] | None = None
    allocation: "Allocator | None" = None
    refine: "Refiner | None" = None
    batch: int = 8
    mesh: Mesh | None = None
    offload: Offload = "device"
    seed: int = 0
    stage: Callable[[str, int], Callable[[], None]] = lambda description, steps: lambda: None
    journal: Journal | None = None

    def step(self, compute: Callable[[], Any], key: Hashable = None) -> Any:
        """`compute()`, as a durable step where there is a journal; what `Journal.step` says of its value holds without one too."""
        return self.journal.step(compute, key) if self.journal else to_serialisable(compute())


class Removed(NamedTuple):
    """What left a linear, as indices of the original one: output rows and input columns. `cut`: gone from the shape, not zeroed."""

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a method did, in terms of slots; names of checkpoints are put in by whoever writes the report.

    Attributes:
      asked: a block's {slot: fraction to remove}; slots that are absent are not covered by the method.
      removed: a block's {slot: Removed} for structured methods, else empty.
      scores: a block's {slot: scores} for the report's plots; `scores_label` says what they are.
      details: method-specific figures, JSON-able.
      warnings: what a reader of the result must know, a sentence each.
      kept_blocks: the original index of every block that was put, for methods that remove whole blocks; None: all, as they were.
    """

    asked: tuple[Mapping[str, float], ...]
    removed: tuple[Mapping[str, Removed], ...] = ()
    scores: tuple[Mapping[str, np.ndarray], ...] = ()
    scores_label: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    kept_blocks: tuple[int, ...] | None = None


class Layerwise(NamedTuple):
    """What a weight method prunes a linear with: an allocator that tries budgets tries them with this."""

    pruner: Pruner
    rule: Pattern


class Allocation(NamedTuple):
    """A budget, with figures for the report (JSON-able) and what its reader must know, a sentence each."""

    budget: Budget
    details: Mapping[str, Any] = {}
    warnings: tuple[str, ...] = ()


SAME = ShapeChange()  # every shape as it was


Rehearsal = Callable[[Model, jax.ShapeDtypeStruct, Request, Rehearse], None]


def nothing(model: Model, tokens: jax.ShapeDtypeStruct, request: Request, run: Rehearse) -> None:
    """The rehearsal of a method that compiles nothing worth counting."""


@dataclasses.dataclass(frozen=True)
class Method:
    """What a user names with --method: `method(model, tokens, request, put)` prunes.

    Attributes:
      leaves: what it makes of a model's shapes.
      counts: its own parameters say how much goes, whatever the request's sparsity.
      check: InputError for a request that it cannot follow on this model; reads no parameters, so it can be asked before any work.
      rehearse: (model and tokens [samples length] of shapes, request, run) -> the programs that are most of the method's work, told to
        `run`; without those of an allocation.
    """

    run: Callable[[Model, np.ndarray, Request, BlockSink], Outcome]
    leaves: ShapeChange = SAME
    counts: bool = False
    check: Callable[[Model, Request], None] = lambda model, request: None
    rehearse: Rehearsal = nothing

    def __call__(
        self, model: Model, tokens: np.ndarray, request: Request, sink: BlockSink
    ) -> Outcome:
        """Prune: calibration windows int [samples length]; finished blocks go to `sink` in order."""
        self.check(model, request)
        return self.run(model, tokens, request, sink)


Allocator = Callable[[Model, np.ndarray, Request, Layerwise], Allocation]
Refiner = Callable[
    [Arch, Mapping[str, Pruner]], Mapping[str, Pruner]
]  # the pruner of each tap -> one that does more


def dropped_indices(keep: np.ndarray) -> tuple[int, ...]:
    """The indices that a keep mask (bool [units]) drops."""
    return tuple(int(i) for i in np.flatnonzero(~keep))


def whole_units(name: str, model: Model, request: Request) -> None:
    """InputError if the request has a pattern or an allocation, which a method of whole units cannot follow."""
    if request.pattern:
        raise InputError(
            f"--pattern={request.pattern[0]}:{request.pattern[1]} is for weight methods: {name} removes whole units, leave it out"
        )
    if request.allocation:
        raise InputError(f"--allocation is for weight methods: {name} sets its own, leave it out")
    not_refined(name, model, request)


def not_refined(name: str, model: Model, request: Request) -> None:
    """InputError if the request would refine the masks of a method that does not prune each linear on its own."""
    if request.refine:
        raise InputError(
            f"--refine is for methods that prune each linear on its own: {name} does not, leave it out"
        )


def prune(
    model: Model, method: Method, tokens: np.ndarray, request: Request
) -> tuple[Model, Outcome]:
    """The pruned model in memory, and what was done: the one call a notebook needs.

    Args:
      tokens: calibration windows, int [samples length].
    """
    blocks: dict[int, Block] = {}
    outcome = method(model, tokens, request, blocks.__setitem__)
    return model._replace(blocks=tuple(blocks[i] for i in range(len(blocks)))), outcome
