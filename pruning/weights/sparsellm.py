"""SparseLLM over a model: attention by SparseGPT or ADMM, each feed-forward part jointly."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from calibration.passes import BlockResult, visit_blocks
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Arch, Block, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.sharding import constrain
from pruning.budget import mean_fractions
from pruning.types import (
    SAME_SHAPES,
    Allocation,
    BlockSink,
    Layerwise,
    Outcome,
    Pattern,
    Pruner,
    Request,
    reject_experts,
    reject_refinement,
)
from pruning.weights import admm, patterns, sparsegpt, sparsegpt_core
from pruning.weights.expert_tokens import few_token_warnings
from pruning.weights.per_linear import (
    allocate,
    by_figure,
    check_pattern,
    counts_if_any,
    pattern_of,
)
from pruning.weights.sparsellm_block import BlockSolver
from pruning.weights.sparsellm_core import Penalties, Settings, as_is
from pruning.weights.sparsellm_figures import loss_figures
from pruning.weights.sparsellm_solvers_core import by_admm, by_sparsegpt

# Activations of the authors' code: relu without a gate (OPT), silu with one (LLaMA).
OFFICIAL_ACTIVATIONS = {False: ("relu",), True: ("silu", "swish")}
# The official code sets alpha = beta = gamma: to 5 for LLaMA, to 0.1 for OPT.
OFFICIAL_GATED, OFFICIAL_PLAIN = Penalties(5.0, 5.0, 5.0), Penalties(0.1, 0.1, 0.1)
# Equal penalties, or alpha = 0.1, leave a larger error (docs/decisions/014-sparsellm.md).
CORRECTED = Penalties(0.01, 10.0, 1.0)
# SparseGPT's 0.01 fits the calibration text more than the model (docs/methods/sparsellm.md).
RIDGE = 1.0


# Cached: a function made anew would be another program.
@functools.cache
def _split_over(mesh: Mesh | None) -> Callable[[Any], Any]:
    """Return what spreads the rows of matrices over a mesh."""
    return as_is if mesh is None else functools.partial(constrain, mesh=mesh, logical="out")


@dataclasses.dataclass(frozen=True)
class SparseLLM:
    """SparseLLM (Bai et al. 2024): SparseGPT for attention, a joint solve of the feed-forward part.

    Args:
      iterations: Iterations of the alternation; the first is the solver alone.
      alpha: Penalty on the outputs of W1 and its gate. None: the authors' in the official variant
        (0.1 for OPT, 5 for LLaMA), else 0.01.
      beta: Penalty on the part's output. None: the authors' (0.1, 5), else 10.
      gamma: Penalty on the input of W2. None: the authors' (0.1, 5), else 1.
      first_half: Prune only the first half of the blocks, as the paper's tables do.
      damp: The solver's damping, as a share of H's mean diagonal. None: 0.01 for SparseGPT, 0.3 for
        ADMM.
      ridge: How firmly the corrected variant's fits hold to the weights they start from: what they
        add to H's diagonal, as a share of its mean. None: 1. At 0.01 they follow the calibration
        text, and other text suffers (docs/methods/sparsellm.md). ADMM has `damp` for this.
      solver: Solver of every linear. "sparsegpt" as in the paper. "admm": ADMM for attention, and
        inside the alternation in place of SparseGPT and its fits, in the corrected variant.
      variant: "official" is the authors' code to the letter, which diverges on SmolLM2 and on tiny
        OPT models. "corrected", the default, has the same objective with sums over tokens and
        Cholesky factors in place of pseudo-inverses. W2 is fitted to the outputs of the pruned W1
        and gate, and the target makes up for pruned attention. The best iteration stays. At 70 %
        on SmolLM2-135M it gives perplexity 88 where SparseGPT gives 145. "corrected" takes any
        activation, "official" those of the authors: relu without a gate, silu with one.
    """

    iterations: int = 4
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    first_half: bool = False
    damp: float | None = None
    ridge: float | None = None
    solver: Literal["sparsegpt", "admm"] = "sparsegpt"
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InputError(f"sparsellm: iterations={self.iterations} must be at least 1")
        penalties = (self.alpha, self.beta, self.gamma)
        if not self._damp >= 0 or any(x is not None and not x > 0 for x in penalties):
            raise InputError(
                "sparsellm: alpha, beta and gamma must be positive, and damp not negative"
            )
        if self._official and self._admm:
            raise InputError('sparsellm: solver="admm" belongs to the corrected variant')
        if self.ridge is not None and (self._official or self._admm or not self.ridge >= 0):
            raise InputError(
                "sparsellm: ridge must not be negative, and belongs to the corrected variant with "
                "SparseGPT"
            )

    @property
    def _official(self) -> bool:
        return self.variant == "official"

    @property
    def _admm(self) -> bool:
        return self.solver == "admm"

    @property
    def _damp(self) -> float:
        if self.damp is None:
            return admm.DAMP if self._admm else sparsegpt.DAMP
        return self.damp

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that all shapes stay."""
        return SAME_SHAPES

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Return that the alternation fits activations."""
        return True

    def _settings(self, arch: Arch, request: Request) -> Settings:
        """Return the settings of the alternation; InputError where the authors have no step."""
        neurons = next(group for group in arch.groups if group.kind == "neurons")
        # A path into the neurons besides the linear one gates them.
        gated, act = len(neurons.writers) > 1, arch.config.act
        # The authors' steps are eq. 7 for relu without a gate and gradient steps for silu with one.
        if self._official and act not in OFFICIAL_ACTIVATIONS[gated]:
            raise InputError(
                f"sparsellm: the official code has no step for {act} "
                f"{'with' if gated else 'without'} a gate",
                'use variant="corrected"',
            )
        default = CORRECTED
        if self._official:
            default = OFFICIAL_GATED if gated else OFFICIAL_PLAIN
        given = (self.alpha, self.beta, self.gamma)
        penalties = Penalties(*(d if x is None else x for d, x in zip(default, given, strict=True)))
        # SparseGPT counts entries by blocks of columns, ADMM by rows.
        by_columns = patterns.per_column_block(sparsegpt_core.COLUMNS)
        pattern = pattern_of(request, patterns.per_row if self._admm else by_columns)
        if self._admm:
            solver = by_admm(self._damp, admm.rounds(pattern))
        else:
            ridge = RIDGE if self.ridge is None else self.ridge
            solver = by_sparsegpt(self._damp, ridge, pattern)
        return Settings(act, pattern, self._damp, solver, penalties, self.iterations)

    def _pruner(self, pattern: Pattern) -> Pruner:
        """Return the solver as a layer-wise rule."""
        if self._admm:
            return admm.pruner(self._damp, admm.rounds(pattern))
        return sparsegpt.pruner(self._damp, pattern)

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_refinement("sparsellm", request)
        if self._official:
            reject_experts("sparsellm", model)
        check_pattern(model, self._settings(model.arch, request).pattern)

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        arch = model.arch
        settings = self._settings(arch, request)._replace(split=_split_over(runtime.mesh))
        rule = self._pruner(settings.pattern)
        solver = BlockSolver(arch, settings, rule, self._official, runtime.mesh)
        # Budgets are tried with the solver alone, which the alternation starts from.
        layerwise = Layerwise(rule, settings.pattern)
        allocation = allocate(model, tokens, request, runtime, layerwise)
        depth = len(model.blocks)
        covered = depth // 2 if self.first_half else depth

        def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
            block_figures: dict[str, dict[str, float]] = {}
            losses: list[float] = []
            counts = counts_if_any(arch, settings.pattern, block, allocation.budget[i])
            # Without counts the solver is skipped: a fit that removes nothing would still change W.
            if i < covered and counts:
                block, block_figures, losses = solver.solve(i, block, xs, counts)
            sink(i, block)
            # A record, not a list out here: a run that goes on reads the finished blocks' records
            # back.
            return BlockResult(block, record=(block_figures, losses))

        records = visit_blocks(model, tokens, runtime, visit, name="pruning")
        return self._outcome(allocation, covered, records)

    def _outcome(
        self,
        allocation: Allocation,
        covered: int,
        records: Sequence[tuple[dict[str, dict[str, float]], list[float]]],
    ) -> Outcome:
        """Return the outcome, with the loss of every iteration and the one that was kept."""
        by_block = mean_fractions(allocation.budget)
        asked = tuple(b if i < covered else {} for i, b in enumerate(by_block))
        losses = [block_losses for _, block_losses in records]
        kept: list[int | None] = []
        for block_losses in losses:
            if not block_losses:
                kept.append(None)
            elif self._official:
                # The official code never goes back to a better iteration.
                kept.append(len(block_losses) - 1)
            else:
                # An iteration may end in NaN. Both this and the solver pass over it, and keep the
                # first of equal losses.
                kept.append(int(np.nanargmin(block_losses)))
        figures_by_name = by_figure([block_figures for block_figures, _ in records])
        details = {
            **allocation.details,
            "loss": losses,
            "iteration_kept": kept,
            **figures_by_name,
        }
        alone = "ADMM" if self._admm else "SparseGPT"
        warnings = [
            f"block {i}: no iteration was better than {alone}'s solution, which stays"
            for i, (k, block_losses) in enumerate(zip(kept, losses, strict=True))
            if k == 0 and len(block_losses) > 1
        ]
        raised = sparsegpt.damping_warnings(self._damp, details)
        return Outcome(
            asked,
            details=details,
            warnings=(*allocation.warnings, *warnings, *raised, *few_token_warnings(details)),
            figures=(*allocation.figures, *loss_figures(losses)),
        )
