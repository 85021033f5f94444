"""FLAP, Wanda-sp and magnitude-sp over a model: which attention heads and feed-forward neurons go, by scores of the channels they write."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Observer, moments
from calibration.passes import Rehearse
from models.arch import Block, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.sharding import to_host
from pruning.structured import remove as units
from pruning.structured.flap_core import (
    Kept,
    Metric,
    Structure,
    Units,
    input_feature_metrics,
    official_fluctuation,
    select_corrected,
    select_official,
)
from pruning.structured.remove import (
    GROUPS,
    OBSERVED,
    Keep,
    Repair,
    check_round_to,
    cost,
    outcome,
    remove,
    repaired,
    walk,
    without,
)
from pruning.structured.select import lowest, rounded
from pruning.types import BlockSink, Method, Outcome, Request, whole_units

Scope = Literal["local", "global"]
Channels = Callable[
    [jax.Array, Any], jax.Array
]  # (W [out in] of a reader, statistics of its input) -> a score of each channel [in]


def _of_readers(
    model: Model, block: Block, stats: Mapping[str, Any], channels: Channels
) -> dict[str, np.ndarray]:
    """{reader of a group: metric of its channels} of a block; stats by tap, none for metrics of weights alone."""
    readers = [model.arch.group(name).reader.name for name in GROUPS]
    return {
        r: to_host(channels(getattr(block, r).w, stats.get(model.arch.tap(r)))) for r in readers
    }


def _measured(
    model: Model,
    tokens: np.ndarray,
    request: Request,
    observer: Observer | None,
    channels: Channels,
    what: str,
    key: Hashable,
) -> tuple[Units, Units, list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """One dense walk: heads and neurons with the metric of their channels, each block's {reader: that}, and its {tap: mean}."""
    groups = [model.arch.group(name) for name in GROUPS]

    def measure(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
        means = {tap: s.mean for tap, s in stats.items()} if observer else {}
        costs = [cost(block, g) for g in groups]  # of a unit: the same in every block
        return block, (_of_readers(model, block, stats, channels), means, costs)

    found, means, (costs, *_) = zip(
        *walk(model, tokens, request, measure, observer, "dense", what, key=key), strict=True
    )
    heads, neurons = (
        Units([m[g.reader.name] for m in found], g.reader.width, c)
        for g, c in zip(groups, costs, strict=True)
    )
    return heads, neurons, list(found), list(means)


def _keeps(kept: Kept, neurons: Sequence[np.ndarray], round_to: int) -> list[Keep]:
    """A block's {group: keep}, the neurons' numbers rounded."""
    pairs = zip(kept.heads, rounded(neurons, kept.neurons, round_to), strict=True)
    return [dict(zip(GROUPS, both, strict=True)) for both in pairs]


def flap(
    metric: Metric = "WIFV",
    structure: Structure | None = None,
    heads_removed: int = 0,
    spread: float = 1.0,
    bias: bool = True,
    refit: bool | None = None,
    round_to: int = 0,
    variant: Literal["corrected", "official"] = "corrected",
) -> Method:
    """FLAP (An et al. 2024): heads and neurons whose inputs to the next linear fluctuate least go, and its bias makes up for their means.

    Args:
      metric: of a channel: "IFV" its fluctuation, "WIFV" that times the squared norm of the weights that read it, "WIFN" Wanda's norm.
      structure: "UL-UM" the same share of every block, "UL-MM" `heads_removed` heads and the rest neurons alike in every block, "AL-MM"
        these over all blocks together, "AL-AM" heads and neurons of all blocks in one list. None: the released code's default in the
        official variant ("AL-AM"), "UL-MM" in the corrected one.
      heads_removed: of the whole model, for the "MM" structures. With none, no more goes than the neurons hold.
      spread: by how much the fraction of its neurons that a block loses may differ from the model's, for "AL-MM" in the corrected variant.
        1: by anything, as in the paper. 0.1 gives SmolLM2-135M 49.8 at 30 % where blocks alike give 51.3, but blocks of different widths.
      bias: add the mean output of what goes to the bias of its reader.
      refit: fit the columns that stay to the dense output too, by least squares over the calibration tokens; costs a second walk. None:
        in the corrected variant, unless bias=False.
      round_to: keep a multiple of so many neurons in each block, as hardware likes it (8 to 128); 0: as many as asked.
      variant: "official" is the released code to the letter (its fluctuation, squares, truncations); "corrected" takes the true variance
        and the parameters that a unit really holds, and leaves one unit of each kind in every block. On SmolLM2-135M its defaults give
        a perplexity of 51.3 at 30 %, where the paper's structure with bias alone gives 78.5 (BUILD_NOTES.md has the table).
    """
    if heads_removed < 0:
        raise InputError(f"flap: heads_removed={heads_removed} must not be negative")
    if not 0 <= spread <= 1:
        raise InputError(f"flap: spread={spread} must be from 0 to 1")
    if refit and not bias:
        raise InputError("flap: refit=True fits the bias too: leave bias=False out")
    official = variant == "official"
    structure = structure or ("AL-AM" if official else "UL-MM")
    refit = bias and not official if refit is None else refit
    how: Repair = "refit" if refit else "bias" if bias else "none"
    check_round_to("flap", round_to)

    def channels(w: jax.Array, stats: Any) -> jax.Array:
        return input_feature_metrics(w, stats)[metric]

    def method(model: Model, tokens: np.ndarray, request: Request, sink: BlockSink) -> Outcome:
        observer = official_fluctuation if official else moments
        what, key = "measuring fluctuation", ("flap", metric, variant)
        heads, neurons, scores, means = _measured(
            model, tokens, request, observer, channels, what, key
        )
        if official and request.sparsity:
            kept = select_official(heads, neurons, request.sparsity, structure, heads_removed)
        else:  # the released code always removes something
            kept = select_corrected(
                heads,
                neurons,
                request.sparsity,
                structure,
                heads_removed if request.sparsity else 0,
                spread,
            )
        keeps = _keeps(kept, neurons.metric, round_to)
        remove(model, tokens, request, sink, keeps, how, means if how == "bias" else None)
        return outcome(model.arch, keeps, request, scores, f"{metric} of channels")

    def rehearse(
        model: Model, tokens: jax.ShapeDtypeStruct, request: Request, run: Rehearse
    ) -> None:
        units.rehearse(
            model, tokens, request, run, official_fluctuation if official else moments, "dense"
        )
        if refit:
            units.rehearse(model, tokens, request, run, OBSERVED[how], "pruned", how)

    leaves = ShapeChange(GROUPS, structure.startswith("UL"), bias)
    return Method(method, leaves, check=functools.partial(whole_units, "flap"), rehearse=rehearse)


@jax.jit
def _wanda_metric(w: jax.Array, norm: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(w.astype(jnp.float32)) * norm[None, :], axis=0)


@jax.jit
def _column_norms(w: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(w.astype(jnp.float32) ** 2, axis=0))


def _wanda_of_stats(w: jax.Array, stats: Any) -> jax.Array:
    return _wanda_metric(w, jnp.sqrt(stats.second.per_sample))


def _magnitude(w: jax.Array, stats: Any) -> jax.Array:
    return _column_norms(w)


def _moments_of(stats: Mapping[str, Any], how: Repair) -> Mapping[str, Any]:
    """The moments among what a repair has observed."""
    return {tap: s[0] for tap, s in stats.items()} if how == "refit" else stats


def by_channels(
    name: str,
    observer: Observer | None,
    channels: Channels,
    label: str,
    scope: Scope = "local",
    repair: Repair = "none",
    round_to: int = 0,
) -> Method:
    """Heads and neurons go by the sum of a metric over each one's channels: a share of every block's, or the lowest of all the model.

    Within blocks the walk goes over pruned blocks, so that one pass measures, repairs and cuts; over the model it takes a dense walk first.

    Args:
      name: of the method, in messages; a journal takes metrics of one name for the same.
      observer: `moments`, or None for a metric of the weights alone.
      channels: (W [out in] of a reader, Moments of its input, if observed) -> a score of each channel [in]; the lowest go.
      label: what the scores are, for the report.
      scope: the same share of every block's heads and of its neurons, or the lowest of all by parameters removed, standardised in blocks.
      repair: of the readers: "bias" adds the mean output of what goes, "refit" fits what stays by least squares.
      round_to: keep a multiple of so many neurons in each block; 0: as many as asked.
    """
    check_round_to(name, round_to)

    def local(model: Model, tokens: np.ndarray, request: Request, sink: BlockSink) -> Outcome:
        arch = model.arch

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            metrics, kept = _of_readers(model, block, _moments_of(stats, repair), channels), {}
            for group in map(arch.group, GROUPS):
                score = metrics[group.reader.name].reshape(-1, group.reader.width).sum(axis=1)
                keep = lowest(score, int(request.sparsity * len(score)))
                (kept[group.name],) = rounded(
                    [score], [keep], round_to if group.name == "neurons" else 0
                )
            new = without(arch, repaired(arch, block, stats, kept, repair), kept)
            sink(i, new)
            return new, (kept, metrics)

        records = walk(
            model, tokens, request, visit, OBSERVED[repair] or observer, "pruned", "pruning"
        )
        keeps, scores = zip(*records, strict=True)
        return outcome(arch, keeps, request, scores, label)

    def over_all(model: Model, tokens: np.ndarray, request: Request, sink: BlockSink) -> Outcome:
        heads, neurons, scores, _ = _measured(
            model, tokens, request, observer, channels, "measuring channels", name
        )
        kept = select_corrected(heads, neurons, request.sparsity, "AL-AM", 0)
        keeps = _keeps(kept, neurons.metric, round_to)
        remove(model, tokens, request, sink, keeps, repair)
        return outcome(model.arch, keeps, request, scores, label)

    def rehearse(
        model: Model, tokens: jax.ShapeDtypeStruct, request: Request, run: Rehearse
    ) -> None:
        if scope == "local":
            units.rehearse(
                model, tokens, request, run, OBSERVED[repair] or observer, "pruned", repair
            )
        else:
            units.rehearse(model, tokens, request, run, observer, "dense")
            units.rehearse(model, tokens, request, run, OBSERVED[repair], "pruned", repair)

    leaves = ShapeChange(GROUPS, scope == "local", repair != "none")
    run = local if scope == "local" else over_all
    return Method(run, leaves, check=functools.partial(whole_units, name), rehearse=rehearse)


def wanda_sp(scope: Scope = "local", repair: Repair = "none", round_to: int = 0) -> Method:
    """Wanda-sp (An et al. 2024): heads and neurons go by the mean of Wanda's scores of what reads them.

    Args:
      scope: the same share of every block's heads and of its neurons, or the lowest of all by parameters removed, standardised in blocks.
      repair: of the readers: "bias" adds the mean output of what goes, "refit" fits what stays by least squares.
      round_to: keep a multiple of so many neurons in each block; 0: as many as asked.
    """
    return by_channels(
        "wanda_sp", moments, _wanda_of_stats, "Wanda's score of channels", scope, repair, round_to
    )


def magnitude_sp(scope: Scope = "local", repair: Repair = "none", round_to: int = 0) -> Method:
    """Magnitude-sp (An et al. 2024): heads and neurons go by the norm of the columns that read them.

    Args:
      scope: the same share of every block's heads and of its neurons, or the lowest of all by parameters removed, standardised in blocks.
      repair: of the readers: "bias" adds the mean output of what goes, "refit" fits what stays by least squares.
      round_to: keep a multiple of so many neurons in each block; 0: as many as asked.
    """
    return by_channels(
        "magnitude_sp", None, _magnitude, "norm of the columns", scope, repair, round_to
    )
