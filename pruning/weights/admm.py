"""ADMM (Boža 2024) over a model, toward each linear's dense output or the dense block's."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import numpy as np

from calibration.observers import Gram, gram
from calibration.passes import BlockResult, visit_blocks
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Block, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from pruning.budget import mean_fractions
from pruning.figures import Figure, LineSeries
from pruning.types import (
    SAME_SHAPES,
    BlockSink,
    Layerwise,
    Outcome,
    Pattern,
    Pruner,
    Request,
    reject_refinement,
)
from pruning.weights import patterns
from pruning.weights.admm_block import solve_block
from pruning.weights.admm_core import Settings, System, prepare, solve
from pruning.weights.expert_tokens import few_token_warnings
from pruning.weights.per_linear import (
    PerLinear,
    allocate,
    by_figure,
    counts_if_any,
    pattern_of,
)

Targets = Literal["block", "own"]
Scope = Literal["row", "matrix"]
SCOPES: Mapping[Scope, Pattern] = {
    "row": patterns.per_row,
    "matrix": patterns.exact_per_matrix,
}
ITERATIONS = 20
# The official 0.1 fits the calibration text more than the model (docs/methods/admm.md).
DAMP, OFFICIAL_DAMP = 0.3, 0.1


# Cached: a function made anew would be another program for every tap.
@functools.cache
def _prepare_with(damp: float) -> Callable[[Gram], tuple[System, dict[str, jax.Array]]]:
    """Return the function that inverts a tap's system with this ridge."""

    def prepare_system(stats: Gram) -> tuple[System, dict[str, jax.Array]]:
        return prepare(stats.total, damp), {}

    return prepare_system


@functools.cache
def pruner(damp: float, settings: Settings) -> Pruner:
    """Return ADMM as a layer-wise rule; equal arguments give one object, so one compilation.

    Args:
      damp: Ridge toward the dense weights, as a share of the mean diagonal.
      settings: Settings of the rounds.
    """
    return Pruner(gram, functools.partial(solve, s=settings), _prepare_with(damp))


def rounds(pattern: Pattern) -> Settings:
    """Return the rounds of the corrected variant, by row.

    Args:
      pattern: Chooses the entries to remove.
    """
    return Settings(ITERATIONS, pattern, patterns.per_row)


def error_figures(errors: Sequence[Mapping[str, float]]) -> tuple[Figure, ...]:
    """Return a plot of the error that every linear is left with, if any was pruned.

    Args:
      errors: By block: slot -> relative error; empty for a block that was not pruned.
    """
    slots = dict.fromkeys(slot for of_block in errors for slot in of_block)
    if not slots:
        return ()
    figure = LineSeries(
        title="Output error by block",
        x_label="block",
        y_label="squared error / squared target",
        series={slot: [of_block.get(slot) for of_block in errors] for slot in slots},
        caption="Errors on the calibration windows, against the targets that linears were given.",
        cut_peaks=True,
    )
    return (figure,)


@dataclasses.dataclass(frozen=True)
class Admm:
    """ADMM (Boža 2024): prune over some rounds, in which the weights that stay make up for others.

    Args:
      targets: What a linear shall give. "own": its dense output on the same inputs, as in the
        paper. "block": what the dense block gives on the same inputs. The linears of a block are
        then solved in turn, on the inputs that the already pruned ones give, and each makes good
        the errors before it. None: "block", in the official variant "own".
      iterations: Rounds; the first three quarters choose the mask. None: 20, as the official code.
      damp: Ridge toward the dense weights, as a share of the mean diagonal of inputs of norm 1.
        None: 0.3, in the official variant 0.1, which follows the calibration text more closely and
        other text less (docs/methods/admm.md).
      scope: "row" removes the same share of every row, "matrix" that of the matrix, wherever the
        entries are. With N:M it decides which groups lose their entries first. None: "row", in the
        official variant "matrix".
      variant: "official" is the authors' code to the letter. Its matrix-wide branch leaves out its
        own schedule, and removes all entries from the first round on. 2:4 is its only N:M; others
        follow the same rule here. "corrected", the default, follows the schedule.
    """

    targets: Targets | None = None
    iterations: int | None = None
    damp: float | None = None
    scope: Scope | None = None
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if self.iterations is not None and self.iterations < 1:
            raise InputError(f"admm: iterations={self.iterations} must be at least 1")
        if self.damp is not None and not self.damp >= 0:  # so that NaN is refused too
            raise InputError(f"admm: damp={self.damp} must not be negative")
        if self._official and self.targets == "block":
            raise InputError('admm: targets="block" belongs to the corrected variant')

    @property
    def _official(self) -> bool:
        return self.variant == "official"

    @property
    def _own(self) -> bool:
        return (self.targets or ("own" if self._official else "block")) == "own"

    @property
    def _unstructured(self) -> Pattern:
        return SCOPES[self.scope or ("matrix" if self._official else "row")]

    def _settings(self, pattern: Pattern) -> Settings:
        """Return the settings of the rounds."""
        unstructured = self._unstructured
        # The official schedule is heeded by row and in groups, not over a whole matrix.
        ungraded = self._official and pattern == patterns.exact_per_matrix
        return Settings(self.iterations or ITERATIONS, pattern, unstructured, not ungraded)

    def _pruner(self, pattern: Pattern) -> Pruner:
        """Return the layer-wise rule."""
        damp = self.damp
        if damp is None:
            damp = OFFICIAL_DAMP if self._official else DAMP
        return pruner(damp, self._settings(pattern))

    @property
    def _per_linear(self) -> PerLinear:
        """Return the method that gives each linear its own target."""
        return PerLinear(self._pruner, self._unstructured)

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that all shapes stay."""
        return SAME_SHAPES

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Return that the system is made of activations."""
        return True

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        if not self._own:
            reject_refinement('admm(targets="block")', request)
        self._per_linear.check(model, request)

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        if self._own:
            return self._per_linear.run(model, tokens, request, runtime, sink)
        arch, pattern = model.arch, pattern_of(request, self._unstructured)
        rule, settings = self._pruner(pattern), self._settings(pattern)
        # Budgets are tried with own targets: a trial has no other linears of its block pruned.
        layerwise = Layerwise(rule, pattern)
        allocation = allocate(model, tokens, request, runtime, layerwise)

        def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
            errors: dict[str, float] = {}
            of_experts: dict[str, dict[str, float]] = {}
            counts = counts_if_any(arch, pattern, block, allocation.budget[i])
            # Without counts the block stays: a fit that removes nothing would still change it.
            if counts:
                block, errors, of_experts = solve_block(arch, rule, settings, i, block, xs, counts)
            sink(i, block)
            return BlockResult(block, record=(errors, of_experts))

        records = visit_blocks(model, tokens, runtime, visit, name="pruning")
        errors = [of_block for of_block, _ in records]
        few = by_figure([of_experts for _, of_experts in records])
        return Outcome(
            mean_fractions(allocation.budget),
            details={**allocation.details, "error": errors, **few},
            warnings=(*allocation.warnings, *few_token_warnings(few)),
            figures=(*allocation.figures, *error_figures(errors)),
        )
