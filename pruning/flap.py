"""FLAP, Wanda-sp and magnitude-sp over a model: attention heads and feed-forward neurons removed whole, their readers repaired."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from calibration.fold import fold_blocks
from calibration.observers import Observer, gram, moments, pair, second_moment
from models.arch import Arch, Block, Group, Model
from models.errors import InputError
from models.surgery import cut, mask
from pruning import repair
from pruning.flap_core import Kept, Metric, Structure, Units, input_feature_metrics, released, released_fluctuation, sound
from pruning.select import lowest
from pruning.types import Method, Outcome, Put, Removed, Request, gone, unstructured_only

GROUPS = ("heads", "neurons")


def _cost(block: Block, group: Group) -> float:
    """Parameters of the matrices that one unit of the group holds in a block."""
    members = (group.reader, *group.writers)
    return float(sum(m.width * getattr(block, m.name).w.shape[1 - m.axis] for m in members))


def _channels(keep: np.ndarray, group: Group) -> np.ndarray:
    """bool [units] as bool [inputs of the reader]."""
    return np.repeat(keep, group.reader.width)


def _removed(arch: Arch, keeps: Mapping[str, np.ndarray]) -> dict[str, Removed]:
    """What leaves every linear: heads are zeroed in place, neurons cut."""
    found = {}
    for name, keep in keeps.items():
        group, is_cut = arch.group(name), name == "neurons"
        found[group.reader.name] = Removed(columns=gone(_channels(keep, group)), cut=is_cut)
        found |= {w.name: Removed(rows=gone(np.repeat(keep, w.width)), cut=is_cut) for w in group.writers}
    return found


def _without(arch: Arch, block: Block, keeps: Mapping[str, np.ndarray]) -> Block:
    """The block without the units that go. Heads stay as zeros: formats of checkpoints want the same number of them in every block."""
    return cut(mask(block, arch.group("heads"), keeps["heads"]), arch.group("neurons"), keeps["neurons"])


def _outcome(arch: Arch, kept: Kept, request: Request, scores: Sequence[Mapping[str, np.ndarray]], label: str) -> Outcome:
    pairs = [dict(zip(GROUPS, both, strict=True)) for both in zip(*kept, strict=True)]
    removed = tuple(_removed(arch, keeps) for keeps in pairs)
    heads = sum(int((~k).sum()) for k in kept.heads)
    warnings = (f"{heads} attention heads are zeroed in place: the file holds their zeros",) if heads else ()
    return Outcome(
        asked=tuple(dict.fromkeys(r, request.sparsity) for r in removed),
        removed=removed,
        scores=tuple(scores),
        scores_label=label,
        details={
            "kept_heads": [[int(i) for i in np.flatnonzero(k)] for k in kept.heads],
            "kept_neurons": [[int(i) for i in np.flatnonzero(k)] for k in kept.neurons],
        },
        warnings=warnings,
    )


def _repaired(arch: Arch, block: Block, stats: Mapping[str, Any], keeps: Mapping[str, np.ndarray], refit: bool) -> Block:
    """The block whose readers make up for the channels that go; statistics have their mean, or are (Moments, Gram) for a refit."""
    new = {}
    for name, keep in keeps.items():
        group = arch.group(name)
        p, seen, channels = getattr(block, group.reader.name), stats[arch.tap(group.reader.name)], _channels(keep, group)
        if refit:
            m, g = seen
            new[group.reader.name] = repair.least_squares(p, g.total, m.mean, g.samples * m.length, channels)
        else:
            new[group.reader.name] = repair.bias(p, seen.mean, channels)
    return block.replace(**new)


def _measured(
    model: Model, tokens: np.ndarray, request: Request, observer: Observer, metric: Metric
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, Any]], dict[str, float]]:
    """One dense walk: a block's {group: metric of its channels}, its {tap: statistics}, and {group: parameters that a unit holds}."""
    groups = {name: model.arch.group(name) for name in GROUPS}
    found: list[dict[str, np.ndarray]] = []
    means: list[dict[str, Any]] = []
    costs: dict[str, float] = {}

    def measure(i: int, block: Block, stats: Mapping[str, Any]) -> Block:
        costs.update({name: _cost(block, g) for name, g in groups.items()})
        found.append({})
        for name, g in groups.items():
            w, seen = getattr(block, g.reader.name).w, stats[model.arch.tap(g.reader.name)]
            found[i][name] = np.asarray(input_feature_metrics(w, seen)[metric])
        means.append(dict(stats))
        return block

    _walk(model, tokens, request, measure, observer, "dense", "measuring fluctuation")
    return found, means, costs


def flap(
    metric: Metric = "WIFV",
    structure: Structure = "AL-AM",
    heads_removed: int = 0,
    bias: bool = True,
    refit: bool = False,
    variant: Literal["corrected", "official"] = "corrected",
) -> Method:
    """FLAP (An et al. 2024): heads and neurons whose inputs to the next linear fluctuate least go, and its bias makes up for their means.

    Args:
      metric: of a channel: "IFV" its fluctuation, "WIFV" that times the squared norm of the weights that read it, "WIFN" Wanda's norm.
      structure: "UL-UM" the same share of every block, "UL-MM" `heads_removed` heads and the rest neurons alike in every block, "AL-MM"
        these over all blocks together, "AL-AM" heads and neurons of all blocks in one list.
      heads_removed: of the whole model, for the "MM" structures.
      bias: add the mean output of what goes to the bias of its reader.
      refit: fit the columns that stay to the dense output too, by least squares over the calibration tokens; costs a second walk.
      variant: "official" is the released code to the letter (its fluctuation, squares, truncations); "corrected" takes the true variance
        and the parameters that a unit really holds, and leaves one unit of each kind in every block.
    """
    if heads_removed < 0:
        raise InputError(f"flap: heads_removed={heads_removed} must not be negative")
    if refit and not bias:
        raise InputError("flap: refit=True fits the bias too: leave bias=False out")
    official = variant == "official"
    observer = released_fluctuation if official else moments

    def method(model: Model, tokens: np.ndarray, request: Request, put: Put) -> Outcome:
        unstructured_only("flap", request)
        arch = model.arch
        groups = {name: arch.group(name) for name in GROUPS}
        found, means, costs = _measured(model, tokens, request, observer, metric)
        heads, neurons = (Units([f[n] for f in found], g.reader.width, costs[n]) for n, g in groups.items())
        choose = released if official and request.sparsity else sound  # the released code always removes something
        kept = choose(heads, neurons, request.sparsity, structure, heads_removed if request.sparsity else 0)
        keeps = [dict(zip(GROUPS, both, strict=True)) for both in zip(*kept, strict=True)]

        def finish(i: int, block: Block, stats: Mapping[str, Any]) -> Block:
            if not all(keep.all() for keep in keeps[i].values()):
                if bias:
                    block = _repaired(arch, block, stats if refit else means[i], keeps[i], refit)
                block = _without(arch, block, keeps[i])
            put(i, block)
            return block

        seen = pair(moments, gram) if refit else None
        _walk(model, tokens, request, finish, seen, "pruned", "pruning")
        scores = [{groups[n].reader.name: m for n, m in f.items()} for f in found]
        return _outcome(arch, kept, request, scores, f"{metric} of channels")

    return method


def _walk(
    model: Model,
    tokens: np.ndarray,
    request: Request,
    visit: Callable[[int, Block, Mapping[str, Any]], Block],
    observer: Observer | None,
    propagate: Literal["pruned", "dense"],
    what: str,
) -> None:
    """`fold_blocks` that watches what the readers of units get; without an observer, blocks alone."""
    watch = {model.arch.tap(model.arch.group(name).reader.name): observer for name in GROUPS} if observer else {}
    advance = request.stage(what, len(model.blocks))
    windows = tokens if observer else tokens[:0]
    fold_blocks(model, windows, visit, watch=watch, propagate=propagate, batch=request.batch, mesh=request.mesh, advance=advance)


@jax.jit
def _wanda_metric(w: jax.Array, norm: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(w.astype(jnp.float32)) * norm[None, :], axis=0)


@jax.jit
def _column_norms(w: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(w.astype(jnp.float32) ** 2, axis=0))


def _by_channels(name: str, observer: Observer | None, metric: Callable[[jax.Array, Any], jax.Array], label: str) -> Method:
    """The same share of every block's heads and neurons goes, by the sum of a metric over each one's channels; no repair."""

    def method(model: Model, tokens: np.ndarray, request: Request, put: Put) -> Outcome:
        unstructured_only(name, request)
        arch = model.arch
        kept, scores = Kept([], []), []

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> Block:
            channels = {}
            for group, keeps in zip(map(arch.group, GROUPS), kept, strict=True):
                m = np.asarray(metric(getattr(block, group.reader.name).w, stats.get(arch.tap(group.reader.name))))
                channels[group.reader.name] = m
                score = m.reshape(-1, group.reader.width).sum(axis=1)
                keeps.append(lowest(score, int(request.sparsity * len(score))))
            scores.append(channels)
            new = _without(arch, block, {"heads": kept.heads[i], "neurons": kept.neurons[i]})
            put(i, new)
            return new

        _walk(model, tokens, request, visit, observer, "pruned", "pruning")
        return _outcome(arch, kept, request, scores, label)

    return method


def wanda_sp() -> Method:
    """Wanda-sp (An et al. 2024): the same share of every block's heads and neurons, by the mean of Wanda's scores of what reads them."""
    return _by_channels("wanda_sp", second_moment, _wanda_of_stats, "Wanda's score of channels")


def magnitude_sp() -> Method:
    """Magnitude-sp (An et al. 2024): the same share of every block's heads and neurons, by the norm of the columns that read them."""
    return _by_channels("magnitude_sp", None, lambda w, stats: _column_norms(w), "norm of the columns")


def _wanda_of_stats(w: jax.Array, stats: Any) -> jax.Array:
    return _wanda_metric(w, jnp.sqrt(stats.per_sample))
