"""LSA (Yang et al. 2026): parts whose greedy pruning errs less keep more."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from calibration.observers import Gram, gram
from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Arch, Block, Model, linear_of
from models.errors import InputError
from models.experts import expert_of
from models.programs import Program
from models.sharding import to_host
from pruning.allocation.dlp_core import relative_importance
from pruning.allocation.figures import allocation_figures
from pruning.allocation.lsa_core import group_counts, reconstruction_error
from pruning.budget import Shapes, all_shapes, block_sparsities, meet_sparsity
from pruning.budget_core import clip_fractions, fractions_from_scores
from pruning.types import Allocation, Budget, Layerwise, Request

Level = Literal["block", "sublayer", "linear"]
# Half of the span of the blocks' sparsities at 10 %, 20 %, … 80 %, from the authors' code.
BLOCK_BETAS = (0.06, 0.02, 0.04, 0.02, 0.04, 0.1, 0.15, 0.12)
FINE_BETA = 0.07  # of sublayers and linears, from the authors' commands

_error = Program(reconstruction_error, "error of greedy pruning", static=(3,))


def _errors_of(
    arch: Arch, block: Block, stats: Mapping[str, Gram], group: int, share: float
) -> dict[str, float]:
    """Return the error of every slot of a block."""
    errors = {}
    for slot in arch.slots_of(block):
        w = linear_of(block, slot.name).w
        counts = group_counts(w.shape[1], group, share)
        label = f"{expert_of(slot.name)[0]}: greedy errors"
        rows = to_host(_error(w, stats[slot.reads], counts, group, name=label))
        # On the host in float64: the sum does not depend on how rows are split over devices.
        errors[slot.name] = float(np.sum(np.asarray(rows, np.float64)))
    return errors


def _parts(arch: Arch, slots: Sequence[str], level: Level) -> list[list[str]]:
    """Return the slots of a block, those that share one sparsity together."""
    if level == "block":
        return [list(slots)]
    if level == "linear":
        return [[slot] for slot in slots]
    heads = [group for group in arch.groups if group.kind == "heads"]
    attention = {member.name for g in heads for member in (g.reader, *g.writers)}
    halves = ([s for s in slots if s in attention], [s for s in slots if s not in attention])
    return [half for half in halves if half]


def _official_budget(
    budget: Sequence[Mapping[str, np.ndarray]], shapes: Shapes, sparsity: float, level: Level
) -> Budget:
    """Return the budget as the authors' code rounds it.

    Below the level of blocks a linear moves from the mean by a number of weights, the same for
    linears of any size, so that small ones move furthest.
    """
    mean_size = np.mean([np.prod(shape) for block in shapes for shape in block.values()])

    def moved(fraction: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        weight = 1.0 if level == "block" else mean_size / np.prod(shape)
        return clip_fractions(sparsity + (fraction - sparsity) * weight)

    return tuple(
        {slot: moved(fraction, block_shapes[slot]) for slot, fraction in block.items()}
        for block, block_shapes in zip(budget, shapes, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Lsa:
    """LSA (Yang et al. 2026): parts with a larger share of the error of greedy pruning lose more.

    Args:
      beta: Half of the span of the sparsities; None: what the authors use at the sparsity, 0.02 to
        0.15 for blocks, 0.07 for smaller parts.
      level: Parts that have their own sparsity: blocks, attention and feed-forward, or linears.
      group: Inputs in a group, of which the same share is removed from each row.
      share: Share of a group that is removed to measure the error.
      variant: "official" clips fractions out of bounds to 0.01 and 0.99 and rounds each alone;
        "corrected", the default, meets the sparsity to one unit and is otherwise the same.
    """

    beta: float | None = None
    level: Level = "block"
    group: int = 128
    share: float = 0.5
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if self.beta is not None and not 0 <= self.beta < 1:
            raise InputError(f"lsa: beta={self.beta} must be at least 0 and less than 1")
        if self.group < 1 or not 0 < self.share < 1:
            raise InputError(
                f"lsa: group={self.group} must be at least 1, share={self.share} between 0 and 1"
            )

    @property
    def reads_activations(self) -> bool:
        """Return that errors are those of outputs on the windows."""
        return True

    def _beta(self, sparsity: float) -> float:
        """Return half of the span of the sparsities."""
        if self.beta is not None:
            return self.beta
        if self.level != "block":
            return FINE_BETA
        return BLOCK_BETAS[min(max(int(10 * sparsity), 1), len(BLOCK_BETAS)) - 1]

    def _budget(
        self,
        arch: Arch,
        shapes: Shapes,
        errors: Sequence[Mapping[str, float]],
        sparsity: float,
    ) -> Budget:
        """Return the budget that follows the errors of linears."""
        parts = [
            (i, part)
            for i, block in enumerate(shapes)
            for part in _parts(arch, [*block], self.level)
        ]
        means = np.array([np.mean([errors[i][slot] for slot in part]) for i, part in parts])
        fractions = fractions_from_scores(
            relative_importance(means), sparsity, self._beta(sparsity)
        )
        budget: list[dict[str, np.ndarray]] = [{} for _ in shapes]
        for (i, part), fraction in zip(parts, fractions, strict=True):
            budget[i] |= dict.fromkeys(part, np.asarray(fraction))
        if self.variant == "corrected":
            return meet_sparsity(tuple(budget), shapes, sparsity)
        return _official_budget(budget, shapes, sparsity, self.level)

    def __call__(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        layerwise: Layerwise,
    ) -> Allocation:
        """Allocate by errors, as `Allocator` says."""
        arch, shapes = model.arch, all_shapes(model)

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            return block, _errors_of(arch, block, stats, self.group, self.share)

        errors = calibrate_blocks(
            model,
            tokens,
            runtime,
            visit,
            watch={s.reads: gram for s in arch.slots},
            propagate="dense",  # errors are those of the dense model, as in the authors' code
            name="measuring greedy errors",
            # Neither beta, level nor sparsity: trials of a sweep share the errors.
            key=("greedy errors", self.group, self.share),
        )
        budget = self._budget(arch, shapes, errors, request.sparsity)
        means = block_sparsities(budget, shapes)
        mean_errors = [sum(block.values()) / len(block) for block in errors]
        return Allocation(
            budget,
            {"error_of_greedy_pruning": errors, "block_sparsity": means},
            figures=allocation_figures(means, request.sparsity, "error", mean_errors),
        )
