"""Perplexity as SparseGPT, Wanda, FLAP and SLEB report it: windows of one stream, no BOS added, the incomplete tail dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.arch import Model, apply_block, cross_entropy, embed
from models.sharding import place, split

ACTIVATION_BYTES = 1 << 30  # hidden states of the windows walked together; more windows walk the blocks again


class Perplexity(NamedTuple):
    """`value` = exp(mean over windows of the window's mean cross-entropy); `cross_entropy` in nats, float64 [windows]."""

    value: float
    cross_entropy: np.ndarray
    tokens: int  # predicted positions: windows * (length - 1)


def perplexity(model: Model, windows: np.ndarray, *, batch: int = 8, mesh: Mesh | None = None) -> Perplexity:
    """Perplexity of a model over token windows.

    Args:
      model: its blocks are read once for every ACTIVATION_BYTES of hidden states.
      windows: int [windows length], length at least 2.
      batch: windows in one micro-batch.
      mesh: windows are split over its `data` axis.
    Returns a Perplexity; its value is inf or nan when the model's own output is.
    """
    arch, ends = model.arch, place(model.ends, mesh)
    width = jax.eval_shape(arch.embed, ends, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    per_window = windows.shape[1] * width.shape[-1] * width.dtype.itemsize
    chunk = max(batch, ACTIVATION_BYTES // per_window // batch * batch)
    found = []
    for start in range(0, len(windows), chunk):
        together = windows[start : start + chunk]
        tokens = [split(together[j : j + batch], mesh, "sample") for j in range(0, len(together), batch)]
        xs = [embed(arch, ends, t) for t in tokens]
        for block in model.blocks:
            placed = place(block, mesh)
            xs = [apply_block(arch, placed, x) for x in xs]
        found += [np.asarray(cross_entropy(arch, ends, x, t), np.float64) for x, t in zip(xs, tokens, strict=True)]
    ce = np.concatenate(found)
    with np.errstate(over="ignore"):
        value = float(np.exp(np.mean(ce)))
    return Perplexity(value, ce, ce.size * (windows.shape[1] - 1))
