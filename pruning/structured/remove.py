"""Remove heads and neurons, repair their readers, and report what was removed.

Any choice of units goes with any repair of the linear that reads them: none; the mean output of the
removed channels added to its bias (FLAP); a least-squares refit of the columns that stay and the
bias; or of the columns alone, for types without such a bias.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from calibration.moments import moments
from calibration.observers import Observer, gram, pair
from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Arch, Block, Group, Model, linear_of, with_linears
from models.checkpoint.widths import WIDTHS, rounded_count
from models.errors import InputError
from models.experts import expert_of
from models.programs import Program
from models.sharding import tree_to_host
from models.surgery import cut, mask
from pruning.budget import all_shapes
from pruning.figures import kept_map
from pruning.structured.repair_core import add_lost_mean, refit_kept_columns
from pruning.types import (
    FEW_TOKENS,
    BlockSink,
    Outcome,
    Removed,
    Request,
    dropped_indices,
)

GROUPS = ("heads", "neurons")
Keep = Mapping[str, np.ndarray]  # group -> bool [units], True stays; absent groups stay whole
Repair = Literal["none", "bias", "refit", "refit_weights"]

_repair_by_bias = Program(add_lost_mean, "readers repaired")
_repair_by_refit = Program(refit_kept_columns, "readers repaired")


class Mean(NamedTuple):
    """Statistics that repair by the bias needs.

    Attributes:
      mean: Mean of each channel over the calibration tokens [c].
    """

    mean: np.ndarray


# Observer of a reader's input that each repair needs.
REPAIR_OBSERVERS: Mapping[Repair, Observer | None] = {
    "none": None,
    "bias": moments,
    "refit": pair(moments, gram),  # the covariance needs the means too
    "refit_weights": pair(moments, gram),
}
ADDS_BIAS: tuple[Repair, ...] = ("bias", "refit")


def check_round_to(method: str, round_to: int) -> None:
    """Raise InputError unless `round_to` is a number of units.

    Args:
      method: Name of the method, for the message.
      round_to: Multiple to round to; 0 for off.
    """
    if round_to < 0:
        raise InputError(
            f"of {method} must not be negative",
            "give 0 for off, or a number of neurons such as 64",
            field="round_to",
            value=round_to,
        )


def cost(block: Block, group: Group) -> float:
    """Return the number of matrix parameters that one unit of the group holds in a block.

    Args:
      block: Only its shapes are read.
      group: The coupled channels.
    """
    # A unit has `width` rows or columns of each linear, each as long as the other axis.
    members = (group.reader, *group.writers)
    return float(sum(m.width * linear_of(block, m.name).w.shape[1 - m.axis] for m in members))


def units_per_block(model: Model, group: str) -> float:
    """Return the mean number of units of a group in a block.

    Args:
      model: Only its shapes are read.
      group: Name of the group.
    """
    reader = model.arch.group(group).reader
    widths = [shapes[reader.name][reader.axis] for shapes in all_shapes(model)]
    return sum(widths) / (len(widths) * reader.width)


def remove_units(arch: Arch, block: Block, keep: Keep) -> Block:
    """Return the block without the dropped units.

    Where all units of a kind are dropped, one stays as zeros: no format stores empty matrices.

    Args:
      arch: Architecture.
      block: Parameters.
      keep: Units that stay, by group.
    """
    for name, stays in keep.items():
        if not stays.any():
            # Zeros first, so that the unit kept for storage computes nothing.
            block = mask(block, arch.group(name), stays)
            stays = np.arange(len(stays)) == 0
        block = cut(block, arch.group(name), stays)
    return block


def _few_widths(stays: np.ndarray) -> np.ndarray:
    """Return units to keep, of which blocks have few numbers: some dropped ones too.

    Args:
      stays: Units that stay, bool [units].
    """
    count, kept = int(stays.sum()), stays.copy()
    kept[np.flatnonzero(~stays)[: rounded_count(count, len(stays)) - count]] = True
    return kept


def _with_zeros(arch: Arch, block: Block, keep: Keep) -> Block:
    """Return a block that computes what the cut one does, with zeros for some dropped units."""
    for name, stays in keep.items():
        group = arch.group(name)
        block = cut(mask(block, group, stays), group, _few_widths(stays))
    return block


def repair_readers(
    arch: Arch, block: Block, stats: Mapping[str, Any], keep: Keep, how: Repair
) -> Block:
    """Return the block whose readers make up for the channels about to be dropped.

    Args:
      arch: Architecture.
      block: Dense parameters.
      stats: By tap: something with the channels' `mean` for "bias", (Moments, Gram) for "refit".
      keep: Units that stay, by group.
      how: The repair. Readers of experts are refitted without a bias, which none of them has.
    """
    repaired = {}
    for name, stays in keep.items():
        if stays.all() or how == "none":
            continue  # a reader that loses nothing stays as it is, bit for bit
        reader = arch.group(name).reader
        linear = linear_of(block, reader.name)
        channels = np.repeat(stays, reader.width)
        tap_stats = stats[arch.tap(reader.name)]
        of_expert = expert_of(reader.name)[1] is not None
        if how == "bias":
            if not of_expert:  # no class has biases in experts
                mean = tree_to_host(tap_stats).mean
                repaired[reader.name] = _repair_by_bias(linear, mean, channels)
            continue
        of_channels, of_pairs = tap_stats
        host = tree_to_host(of_channels)
        # The observer counts windows; its sum of x x^T runs over their tokens.
        tokens = tree_to_host(of_pairs.samples) * host.length
        if of_expert and tokens < FEW_TOKENS:
            continue  # nothing to fit to
        adds_bias = how == "refit" and not of_expert
        # Without a bias the fit is to the products themselves, not to their distance from the mean.
        mean = host.mean if adds_bias else np.zeros_like(host.mean)
        new = _repair_by_refit(linear, of_pairs.total, mean, tokens, channels)
        repaired[reader.name] = new if adds_bias else new.replace(b=linear.b)
    return with_linears(block, repaired)


def watch_readers(
    arch: Arch, observer: Observer | None, groups: Sequence[str] = GROUPS
) -> dict[str, Observer]:
    """Return the observer for every tap that a reader of the groups reads; nothing without one.

    Args:
      arch: Architecture.
      observer: Observer of the readers' inputs.
      groups: Kinds of groups.
    """
    if observer is None:
        return {}
    of_kinds = (group for group in arch.groups if group.kind in groups)
    return {arch.tap(group.reader.name): observer for group in of_kinds}


def calibrate_readers(
    model: Model,
    tokens: np.ndarray,
    runtime: Runtime,
    visit: Callable[[int, Block, Mapping[str, Any]], tuple[Block, Any]],
    observer: Observer | None,
    propagate: Literal["pruned", "dense"],
    name: str,
    groups: Sequence[str] = GROUPS,
    key: Hashable = None,
) -> list[Any]:
    """Visit every block with statistics of what the readers of the groups read.

    Args:
      model: Read one block at a time.
      tokens: Calibration windows, int [samples length].
      runtime: How to execute.
      visit: As `calibrate_blocks` has it.
      observer: Observer of the readers' inputs; None: blocks are visited without activations.
      propagate: Outputs that the next block sees.
      name: What the progress bar says.
      groups: Groups whose readers are observed.
      key: As `calibrate_blocks` has it.

    Returns:
      Record of every block.
    """
    watch = watch_readers(model.arch, observer, groups)
    return calibrate_blocks(
        model, tokens, runtime, visit, watch=watch, propagate=propagate, name=name, key=key
    )


def remove(
    model: Model,
    tokens: np.ndarray,
    runtime: Runtime,
    sink: BlockSink,
    keeps: Sequence[Keep],
    how: Repair,
    means: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Repair and cut every block and hand it to the sink.

    A repair takes its statistics from what reaches each block of the model pruned so far.

    Args:
      model: The dense model.
      tokens: Calibration windows, int [samples length].
      runtime: How to execute.
      sink: Takes the finished blocks.
      keeps: Units that stay, by block and group.
      how: Repair of the readers.
      means: By block: tap -> mean of its channels, for a repair by the bias that needs no
        statistics of its own.
    """
    # The official FLAP takes the bias from the dense means too. That saves a second forward.
    observer = REPAIR_OBSERVERS[how] if means is None else None
    shapes = {tuple((name, int(stays.sum())) for name, stays in keep.items()) for keep in keeps}
    # A program for every width takes longer to compile than narrower blocks save.
    widened = observer is not None and len(shapes) > WIDTHS

    def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
        if means is not None:
            stats = {tap: Mean(mean) for tap, mean in means[i].items()}
        # Repair before the cut: statistics have an entry for every dense channel.
        block = repair_readers(model.arch, block, stats, keeps[i], how)
        narrow = remove_units(model.arch, block, keeps[i])
        sink(i, narrow)
        return _with_zeros(model.arch, block, keeps[i]) if widened else narrow, None

    kinds = {model.arch.group(name).kind for keep in keeps for name in keep}
    groups = [kind for kind in GROUPS if kind in kinds]
    calibrate_readers(model, tokens, runtime, visit, observer, "pruned", "pruning", groups)


def removed_outcome(
    arch: Arch,
    keeps: Sequence[Keep],
    request: Request,
    scores: Sequence[Mapping[str, np.ndarray]],
    scores_label: str,
) -> Outcome:
    """Return the outcome of removing units.

    Args:
      arch: Architecture.
      keeps: Units that stay, by block and group.
      request: Its sparsity was asked of every linear.
      scores: By block: slot -> scores of its channels.
      scores_label: Name of the scores.

    Returns:
      Outcome whose details hold, for each group and by block, the kept indices, and under "units"
      the number of units of the model that came in.
    """
    removed = []
    for keep in keeps:
        linears = {}
        for name, stays in keep.items():
            group = arch.group(name)
            columns = dropped_indices(np.repeat(stays, group.reader.width))
            linears[group.reader.name] = Removed(columns=columns, cut=True)
            for writer in group.writers:
                rows = dropped_indices(np.repeat(stays, writer.width))
                linears[writer.name] = Removed(rows=rows, cut=True)
        removed.append(linears)
    kinds = dict.fromkeys(arch.group(name).kind for keep in keeps for name in keep)
    kept_units = {f"kept_{kind}": [_indices(keep, kind) for keep in keeps] for kind in kinds}
    masks = {kind: [_mask(keep, kind) for keep in keeps] for kind in kinds}
    # By block: a model that was pruned before may have blocks of different widths.
    units = {kind: [len(mask) for mask in by_block] for kind, by_block in masks.items()}
    return Outcome(
        asked=tuple(dict.fromkeys(linears, request.sparsity) for linears in removed),
        removed=tuple(removed),
        scores=tuple(scores),
        scores_label=scores_label,
        details={**kept_units, "units": units},
        figures=tuple(kept_map(kind, by_block) for kind, by_block in masks.items()),
    )


def _indices(keep: Keep, kind: str) -> list[Any]:
    """Return the indices of a block's kept units; of experts a list for each."""
    kept = [np.flatnonzero(keep[n]).tolist() for n in keep if n.rpartition(".")[2] == kind]
    return kept[0] if kind in keep else kept


def _mask(keep: Keep, kind: str) -> np.ndarray:
    """Return the keep mask of a block's units, bool [units]; of experts the number, kept first."""
    if kind in keep:
        return keep[kind]
    of_one = next(mask for name, mask in keep.items() if name.endswith(f".{kind}"))
    return np.sort(of_one)[::-1]
