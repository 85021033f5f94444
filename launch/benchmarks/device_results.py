"""Results of pruning on one device, and how far two of them lie apart."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.runtime import Runtime
from eval.perplexity import perplexity
from models.arch import Model, linear_of
from models.jax_settings import current
from models.sharding import to_host
from pruning.types import Method, Outcome, Removed, Request, prune

Matrices = tuple[dict[str, np.ndarray], ...]  # by block of the dense model: slot -> [out in]


class Result(NamedTuple):
    """What one run gives.

    Attributes:
      weights: Matrices in the dense model's shapes, zero where weights were removed, float32.
      perplexity: Of the pruned model.
    """

    weights: Matrices
    perplexity: float


class Distance(NamedTuple):
    """How far two results lie apart.

    Attributes:
      masks: Share of all entries that are zero in one of them alone.
      weights: Largest difference of an entry that both keep, over the largest entry of its matrix;
        of rows with equal masks, because the others make up for different entries.
      perplexity: Relative difference of the perplexities.
    """

    masks: float
    weights: float
    perplexity: float


@contextlib.contextmanager
def on_device(device: jax.Device) -> Iterator[None]:
    """Make a device the default of all threads: blocks are read ahead in threads of their own.

    Args:
      device: The device.
    """
    before = current("jax_default_device")
    jax.config.update("jax_default_device", device)
    try:
        yield
    finally:
        jax.config.update("jax_default_device", before)


def _whole(w: np.ndarray, shape: tuple[int, int], removed: Removed) -> np.ndarray:
    """Return a matrix in its dense shape, float32, with zeros in the place of what was cut."""
    rows, columns = (
        np.setdiff1d(np.arange(size), lost if removed.cut else ())
        for size, lost in zip(shape, (removed.rows, removed.columns), strict=True)
    )
    whole = np.zeros(shape, np.float32)
    # A part of which nothing stays keeps one unit of zeros, so that the block can still be run.
    if rows.size and columns.size:
        whole[np.ix_(rows, columns)] = w
    return whole


def _renumbered(slot: str, kept: tuple[int, ...] | None) -> str | None:
    """Return a slot's name in a block with fewer experts; None if its expert was removed."""
    name, *rest = slot.split(".")
    if kept is None or not rest:
        return slot
    expert, field = int(rest[0]), rest[1]
    return f"{name}.{kept.index(expert)}.{field}" if expert in kept else None


def dense_shaped(dense: Model, pruned: Model, outcome: Outcome) -> Matrices:
    """Return the pruned model's matrices in the shapes of the dense one.

    Args:
      dense: The dense model.
      pruned: The pruned model.
      outcome: What was removed from which.
    """
    kept = outcome.kept_blocks or tuple(range(len(dense.blocks)))
    matrices: list[dict[str, np.ndarray]] = []
    for i, block in enumerate(dense.blocks):
        removed = outcome.removed[i] if outcome.removed else {}
        experts = outcome.kept_experts[i] if outcome.kept_experts else None
        own: dict[str, np.ndarray] = {}
        for slot in (s.name for s in dense.arch.slots_of(block)):
            own[slot] = np.zeros(linear_of(block, slot).w.shape, np.float32)
            name = _renumbered(slot, experts)
            if i in kept and name is not None:
                w = to_host(linear_of(pruned.blocks[kept.index(i)], name).w).astype(np.float32)
                own[slot] = _whole(w, own[slot].shape, removed.get(slot, Removed()))
        matrices.append(own)
    return tuple(matrices)


def pruned_on(
    device: jax.Device | None,
    model: Callable[[], Model],
    method: Method,
    request: Request,
    windows: Mapping[str, np.ndarray],
    runtime: Runtime = Runtime(),  # noqa: B008, frozen
) -> Result:
    """Prune a model on a device.

    Args:
      device: The device; None: those of the runtime's mesh.
      model: Gives the dense model, on the default device.
      method: What to prune with.
      request: What to remove.
      windows: Tokens to calibrate on and to measure with, int [samples length], by "calibration"
        and "evaluation".
      runtime: How to execute.
    """
    with on_device(device) if device else contextlib.nullcontext():
        dense = model()
        pruned, outcome = prune(dense, method, windows["calibration"], request, runtime)
        value = perplexity(
            pruned, windows["evaluation"], batch=runtime.batch, mesh=runtime.mesh
        ).value
        return Result(dense_shaped(dense, pruned, outcome), value)


def with_noise(model: Model, size: float) -> Model:
    """Return the model with its embeddings off by a rounding each.

    Args:
      model: The model.
      size: Relative size of a rounding.
    """
    embed = model.non_block.embed
    signs = jax.random.rademacher(jax.random.key(0), embed.shape, jnp.float32)
    noisy = embed.astype(jnp.float32) * (1 + size * signs)
    return model._replace(non_block=model.non_block.replace(embed=noisy.astype(embed.dtype)))


def distance(a: Result, b: Result) -> Distance:
    """Return how far two results lie apart.

    Args:
      a: A result.
      b: Another of the same model.
    """
    differing = entries = 0
    worst = 0.0
    for ours, theirs in zip(a.weights, b.weights, strict=True):
        for slot, w in ours.items():
            v = theirs[slot]
            unlike = (w != 0) != (v != 0)
            differing += int(np.sum(unlike))
            entries += w.size
            change = np.abs(w - v)[~unlike.any(axis=1)]
            # Zeros alone differ by nothing.
            largest = float(np.max(np.abs(v))) or 1.0
            worst = max(worst, float(np.max(change, initial=0.0)) / largest)
    ppl = 0.0 if a.perplexity == b.perplexity else abs(a.perplexity / b.perplexity - 1)
    return Distance(differing / entries, worst, ppl)
