"""What was removed, counted in the checkpoint that was written, and what a reader of the figures must know."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.size import Size
from launch.run import export
from models.checkpoint.reader import Checkpoint
from pruning.types import Outcome

MISSED = 0.005  # a budget missed by more of the prunable weights is worth a warning


class Counts(NamedTuple):
    """Weights by linear's name: of the dense model, and of them those that are gone or zero."""

    dense: dict[str, int]
    gone: dict[str, int]


def count(checkpoint: Checkpoint, size: Size, kept: Sequence[int] | None = None) -> Counts:
    """What was removed from each linear, counted in the written checkpoint, which holds these blocks alone (None: all)."""
    specs, slots = checkpoint.specs, [s.name for s in checkpoint.model.arch.slots]
    dense = export.by_linear(
        specs, tuple({s: math.prod(getattr(b, s).w.shape) for s in slots} for b in specs)
    )
    left = export.by_linear(specs if kept is None else tuple(specs[i] for i in kept), size.nonzero)
    return Counts(dense, {name: n - left.get(name, 0) for name, n in dense.items()})


def sparsity_figures(
    checkpoint: Checkpoint, outcome: Outcome, counts: Counts, dense: int, target: float
) -> dict[str, Any]:
    """The report's `sparsity`: fractions of the dense model's weights that are gone or zero. "prunable" are those the method covers."""
    asked = export.by_linear(checkpoint.specs, outcome.asked)
    return {
        "target": target,
        "prunable": sum(counts.gone[name] for name in asked)
        / sum(counts.dense[name] for name in asked),
        "total": sum(counts.gone.values()) / dense,
        "per_linear": {name: gone / counts.dense[name] for name, gone in counts.gone.items()},
        "asked": asked,
    }


def quantiles(checkpoint: Checkpoint, outcome: Outcome) -> dict[str, Any]:
    """The report's `scores`: minimum, quartiles and maximum by linear."""
    levels = [0, 0.25, 0.5, 0.75, 1]
    per_linear = export.by_linear(
        checkpoint.specs, outcome.scores, lambda x: [float(q) for q in np.quantile(x, levels)]
    )
    return {"label": outcome.scores_label, "per_linear": per_linear}


def warnings_of(
    figures: Mapping[str, Any], written: export.Written, checkpoint: Checkpoint, length: int
) -> Iterator[str]:
    """What a reader of the figures must know."""
    if written.padding:
        yield f"{written.padding:,} of the stored numbers are zeros that fill narrower blocks and absent biases up"
    if written.form.code:
        yield f"blocks differ in width: the model loads as {written.form.label}; --layout=padded writes a stock model instead"
    if not written.transformers.ok:
        yield f"transformers does not give the same logits: {written.transformers.message}"
    if abs(figures["prunable"] - figures["target"]) > MISSED:
        yield f"asked for {figures['target']:.4f} of the prunable weights, got {figures['prunable']:.4f}"
    longest = checkpoint.config.get("max_position_embeddings")
    if longest and length > longest:
        yield f"calibration windows of {length} tokens are longer than the {longest} positions the model was trained for"
