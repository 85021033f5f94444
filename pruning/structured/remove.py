"""Removing whole units, whoever chose them: attention heads and neurons cut, their readers repaired, what became of it told.

Any choice (`{group: bool [units]}` a block) goes with any repair of the linear that reads the group: none; the mean output of what went in
its bias (FLAP's); or a least-squares refit of what it still reads.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from calibration.observers import Observer, gram, moments, pair
from calibration.passes import Rehearse, rehearse_fold
from models.arch import Arch, Block, Group, Model
from models.errors import InputError
from models.surgery import cut, mask
from pruning.structured import repair
from pruning.types import BlockSink, Outcome, Removed, Request, dropped_indices
from pruning.walk import fold

GROUPS = ("heads", "neurons")
Keep = Mapping[
    str, np.ndarray
]  # group -> bool [units], True stays; groups that are absent stay whole
Repair = Literal["none", "bias", "refit"]


class Mean(NamedTuple):
    """All that repair by the bias wants of a tap's statistics: the mean of its channels [c]."""

    mean: np.ndarray


OBSERVED: Mapping[Repair, Observer | None] = {
    "none": None,
    "bias": moments,
    "refit": pair(moments, gram),
}


def check_round_to(name: str, round_to: int) -> None:
    """InputError unless it is a number of units."""
    if round_to < 0:
        raise InputError(
            f"{name}: round_to={round_to} must be 0 for off, or a number of neurons such as 64"
        )


def cost(block: Block, group: Group) -> float:
    """Parameters of the matrices that one unit of the group holds in a block."""
    members = (group.reader, *group.writers)
    return float(sum(m.width * getattr(block, m.name).w.shape[1 - m.axis] for m in members))


def without(arch: Arch, block: Block, keep: Keep) -> Block:
    """The block without the units that go. Where all of a kind go, one stays as zeros: nothing has empty matrices."""
    for name, stays in keep.items():
        if not stays.any():
            block = mask(block, arch.group(name), stays)
            stays = np.arange(len(stays)) == 0
        block = cut(block, arch.group(name), stays)
    return block


def repaired(arch: Arch, block: Block, stats: Mapping[str, Any], keep: Keep, how: Repair) -> Block:
    """The block whose readers make up for the channels that go.

    Args:
      stats: by tap: something with a `mean` of the channels for "bias", (Moments, Gram) for "refit".
    """
    new = {}
    for name, stays in keep.items():
        group = arch.group(name)
        p, channels = getattr(block, group.reader.name), np.repeat(stays, group.reader.width)
        if stays.all() or how == "none":
            continue
        seen = stats[arch.tap(group.reader.name)]
        if how == "refit":
            m, g = seen
            new[group.reader.name] = repair.least_squares(
                p, g.total, m.mean, g.samples * m.length, channels
            )
        else:
            new[group.reader.name] = repair.bias(p, seen.mean, channels)
    return block.replace(**new)


def _watch(arch: Arch, observer: Observer | None, groups: Sequence[str]) -> dict[str, Observer]:
    """What the readers of the groups get, watched."""
    return {arch.tap(arch.group(name).reader.name): observer for name in groups} if observer else {}


def walk(
    model: Model,
    tokens: np.ndarray,
    request: Request,
    visit: Callable[[int, Block, Mapping[str, Any]], tuple[Block, Any]],
    observer: Observer | None,
    propagate: Literal["pruned", "dense"],
    what: str,
    groups: Sequence[str] = GROUPS,
    key: Hashable = None,
) -> list[Any]:
    """`fold` that watches what the readers of the groups get; without an observer, blocks alone."""
    return fold(
        model,
        tokens,
        request,
        visit,
        watch=_watch(model.arch, observer, groups),
        propagate=propagate,
        what=what,
        key=key,
    )


def rehearse(
    model: Model,
    tokens: jax.ShapeDtypeStruct,
    request: Request,
    run: Rehearse,
    observer: Observer | None,
    propagate: Literal["pruned", "dense"],
    how: Repair = "none",
    groups: Sequence[str] = GROUPS,
) -> None:
    """What `walk` compiles, and the repair of readers that lose half of what they read, told to `run`; model and tokens of shapes."""
    arch, block = model.arch, model.blocks[0]
    watch = _watch(arch, observer, groups)
    _, stats = rehearse_fold(
        model, tokens, run, watch=watch, propagate=propagate, batch=request.batch
    )
    if how != "none":
        counts = {
            g.name: getattr(block, g.reader.name).w.shape[1] // g.reader.width
            for g in map(arch.group, groups)
        }
        keep = {name: np.arange(n) < n // 2 for name, n in counts.items()}
        run(
            "readers repaired",
            lambda b, s: repaired(arch, b, s, keep, how),
            block,
            stats,
            calls=len(model.blocks),
        )


def remove(
    model: Model,
    tokens: np.ndarray,
    request: Request,
    sink: BlockSink,
    keeps: Sequence[Keep],
    how: Repair,
    known: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Repair and cut every block and hand it over.

    Args:
      keeps: a block's choice.
      how: a repair takes its statistics from what reaches each block of the model pruned so far,
      known: unless it is the bias and each block's {tap: mean of its channels} is given.
    """

    def finish(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
        seen = {tap: Mean(mean) for tap, mean in known[i].items()} if known else stats
        block = without(model.arch, repaired(model.arch, block, seen, keeps[i], how), keeps[i])
        sink(i, block)
        return block, None

    walk(
        model,
        tokens,
        request,
        finish,
        None if known else OBSERVED[how],
        "pruned",
        "pruning",
        list(keeps[0]),
    )


def outcome(
    arch: Arch,
    keeps: Sequence[Keep],
    request: Request,
    scores: Sequence[Mapping[str, np.ndarray]],
    label: str,
) -> Outcome:
    """What left every linear, and which units stayed."""
    removed = []
    for keep in keeps:
        found = {}
        for name, stays in keep.items():
            group = arch.group(name)
            found[group.reader.name] = Removed(
                columns=dropped_indices(np.repeat(stays, group.reader.width)), cut=True
            )
            found |= {
                w.name: Removed(rows=dropped_indices(np.repeat(stays, w.width)), cut=True)
                for w in group.writers
            }
        removed.append(found)
    return Outcome(
        asked=tuple(dict.fromkeys(r, request.sparsity) for r in removed),
        removed=tuple(removed),
        scores=tuple(scores),
        scores_label=label,
        details={
            f"kept_{name}": [[int(i) for i in np.flatnonzero(keep[name])] for keep in keeps]
            for name in keeps[0]
        }
        | {
            "units": {name: len(mask) for name, mask in keeps[0].items()}
        },  # of each kind, in every block of the dense model
    )
