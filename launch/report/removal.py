"""Count what was removed in the written checkpoint, and warn about surprises."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.size import Size
from launch.report import summary
from launch.run import export
from models.checkpoint.reader import Checkpoint
from models.experts import expert_of
from pruning.budget import all_shapes
from pruning.types import Outcome

# Sparsity may miss its target by this much, as a fraction of the prunable weights.
TOLERANCE = 0.005
PADDING = 0.01  # share of padding in the stored values from which it matters
# How warnings begin about the logits of a checkpoint that was loaded back.
OTHER_LOGITS = "the checkpoint gives other logits than the model in memory: "
NOT_REPRODUCED = "transformers does not reproduce the logits: "


class LinearCounts(NamedTuple):
    """Number of weights by name of linear.

    Attributes:
      dense: All weights of the dense model.
      removed: Weights of the dense model that are absent or zero in the pruned one.
    """

    dense: dict[str, int]
    removed: dict[str, int]


def count_removed(checkpoint: Checkpoint, size: Size, outcome: Outcome) -> LinearCounts:
    """Count the weights removed from each linear.

    Args:
      checkpoint: The dense checkpoint.
      size: Size of the pruned checkpoint, as `eval.size.measure` returns it.
      outcome: Result of the method, with the blocks and experts that were kept.
    """
    specs, shapes = checkpoint.specs, all_shapes(checkpoint.model)
    sizes = tuple({s: math.prod(shape) for s, shape in block.items()} for block in shapes)
    dense = export.by_linear(specs, sizes)
    kept = outcome.kept_blocks
    of_kept = specs if kept is None else tuple(specs[i] for i in kept)
    left = export.by_linear(of_kept, _by_original_expert(size.nonzero, outcome))
    return LinearCounts(dense, {name: n - left.get(name, 0) for name, n in dense.items()})


def _by_original_expert(
    nonzero: Sequence[Mapping[str, int]], outcome: Outcome
) -> tuple[Mapping[str, int], ...]:
    """Return counts by slot, by block, under the numbers that experts had in the dense model."""
    if outcome.kept_experts is None:
        return tuple(nonzero)
    renamed = []
    for counts, kept in zip(nonzero, outcome.kept_experts, strict=True):
        original = {}
        for slot, count in counts.items():
            expert = expert_of(slot)[1]
            if expert is not None and kept is not None:
                slot = f"experts.{kept[expert]}.{slot.rpartition('.')[2]}"
            original[slot] = count
        renamed.append(original)
    return tuple(renamed)


def sparsity(
    checkpoint: Checkpoint, outcome: Outcome, counts: LinearCounts, dense: int, target: float
) -> dict[str, Any]:
    """Return the report's `sparsity`: fractions of the dense model's weights that were removed.

    Args:
      checkpoint: The dense checkpoint.
      outcome: Result of the method; `asked` names the linears it covers.
      counts: Weights by linear, dense and removed.
      dense: Number of parameters of the dense model.
      target: Sparsity of the request.

    Returns:
      `target`; `prunable`, over the linears that the method covers; `total`, over the whole
      model; `per_linear` and `asked`, by linear.
    """
    asked = export.by_linear(checkpoint.specs, outcome.asked)
    covered = sum(counts.dense[name] for name in asked)
    return {
        "target": target,
        "prunable": sum(counts.removed[name] for name in asked) / covered,
        "total": sum(counts.removed.values()) / dense,
        "per_linear": {name: n / counts.dense[name] for name, n in counts.removed.items()},
        "asked": asked,
    }


def linear_warnings(
    outcome: Outcome, counts: LinearCounts, checkpoint: Checkpoint
) -> Iterator[str]:
    """Yield which linears lost another share than was asked of them, and which hold zeros alone.

    Args:
      outcome: Result of the method.
      counts: Weights by linear, dense and removed.
      checkpoint: The dense checkpoint.
    """
    # Methods of units and blocks meet their budget over the model, not in every linear.
    whole = outcome.kept_blocks is not None or outcome.kept_experts is not None
    if not outcome.removed and not whole:
        yield from _missed(outcome, counts, checkpoint)
    if whole:
        return  # what blocks leave behind is as it was, or zeroed on purpose
    empty = [name for name, n in counts.removed.items() if n == counts.dense[name]]
    if empty:
        yield (
            f"{len(empty)} of {len(counts.dense)} linears hold zeros alone ({_some(empty)}): all "
            "their scores were equal or zero, or all their units were removed"
        )


def _missed(outcome: Outcome, counts: LinearCounts, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a sentence where linears missed their share by more than rounding."""
    asked = export.by_linear(checkpoint.specs, outcome.asked)
    inputs = export.by_linear(
        checkpoint.specs,
        tuple(
            {s: into for s, (_, into) in block.items()} for block in all_shapes(checkpoint.model)
        ),
    )
    shares = {name: counts.removed[name] / counts.dense[name] for name in asked}
    gaps = {name: abs(shares[name] - asked[name]) for name in asked}
    # Rows are rounded to whole entries.
    missed = [name for name, gap in gaps.items() if gap > max(TOLERANCE, 1 / inputs[name])]
    if missed:
        missed.sort(key=lambda name: -gaps[name])
        examples = [
            f"{name} {summary.percent(shares[name])} for {summary.percent(asked[name])}"
            for name in missed
        ]
        yield (
            f"{len(missed)} of {len(asked)} linears lost another share than was asked "
            f"({_some(examples)}): equal scores went together, or zeros were there before"
        )


def _some(texts: Sequence[str]) -> str:
    """Return the first three texts, and how many more there are."""
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def score_quantiles(checkpoint: Checkpoint, outcome: Outcome) -> dict[str, Any]:
    """Return the report's `scores`: minimum, quartiles and maximum of the scores by linear."""
    levels = [0, 0.25, 0.5, 0.75, 1]
    per_linear = export.by_linear(
        checkpoint.specs, outcome.scores, lambda x: [float(q) for q in np.quantile(x, levels)]
    )
    return {"label": outcome.scores_label, "per_linear": per_linear}


def warnings(
    sparsity: Mapping[str, Any], written: export.Written, checkpoint: Checkpoint, length: int
) -> Iterator[str]:
    """Yield what a reader of the report must know, one clause each.

    Args:
      sparsity: The report's `sparsity`.
      written: The pruned checkpoint, loaded back.
      checkpoint: The dense checkpoint.
      length: Tokens in a calibration window.
    """
    if written.padding >= PADDING * written.loaded.parameters:
        yield _padding(written)
    yield from logits_warnings(written)
    blocks = len(checkpoint.specs)
    # Where whole blocks were removed, the target cannot be met more closely than to half a block.
    step = 0.0 if len(written.loaded.specs) == blocks else 0.5 / blocks
    target = sparsity["target"]
    if target is not None and abs(sparsity["prunable"] - target) > max(TOLERANCE, step):
        yield (
            f"{summary.percent(sparsity['prunable'])} of the prunable weights were removed, "
            f"the target was {summary.percent(target)}"
        )
    positions = checkpoint.config.get("max_position_embeddings")
    if positions and length > positions:
        yield (
            f"calibration windows have {length} tokens, "
            f"but the model was trained for {positions} positions"
        )


def logits_warnings(written: export.Written) -> Iterator[str]:
    """Yield what is wrong with the logits of a checkpoint that was loaded back.

    Args:
      written: The checkpoint.
    """
    if not written.topiary.ok:
        yield OTHER_LOGITS + written.topiary.message
    if not written.transformers.ok:
        yield NOT_REPRODUCED + written.transformers.message


def without_logits_warnings(warnings: Iterable[str]) -> list[str]:
    """Return the warnings that do not come from `logits_warnings`.

    Args:
      warnings: Warnings of a report, whose checkpoint another one replaces.
    """
    return [text for text in warnings if not text.startswith((OTHER_LOGITS, NOT_REPRODUCED))]


def _padding(written: export.Written) -> str:
    share = summary.percent(written.padding / written.loaded.parameters)
    return (
        f"{written.padding:,} stored values ({share}) are zero padding for narrower blocks "
        "and missing biases"
    )


def notes(written: export.Written) -> Iterator[str]:
    """Yield what a reader may want to know, and need not worry about.

    Args:
      written: The pruned checkpoint, loaded back.
    """
    if 0 < written.padding < PADDING * written.loaded.parameters:
        yield _padding(written)
    if written.form.code:
        yield (
            f"blocks differ in width, so the model loads as {written.form.label}; "
            "--layout=padded writes a stock architecture instead"
        )
