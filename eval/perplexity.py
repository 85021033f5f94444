"""Perplexity as SparseGPT, Wanda, FLAP and SLEB report it: windows of one stream, no BOS added, the incomplete tail dropped."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.arch import Arch, Ends, Model, apply_block, embed
from models.sharding import place, split

ACTIVATION_BYTES = 1 << 30  # hidden states of the windows walked together; more windows walk the blocks again


class Perplexity(NamedTuple):
    """`value` = exp(mean over windows of the window's mean cross-entropy); `cross_entropy` in nats, float64 [windows]."""

    value: float
    cross_entropy: np.ndarray
    tokens: int  # predicted positions: windows * (length - 1)


@functools.partial(jax.jit, static_argnums=0)
def _cross_entropy(arch: Arch, ends: Ends, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of each window [b], float32, from the hidden states x [b t d] and tokens [b t]."""

    def window(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, t = args
        logits = arch.head(ends, x[None, :-1])[0]
        chosen = jnp.take_along_axis(logits, t[1:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    # One window at a time: the logits of one are already as large as a block's weights.
    return jax.lax.map(window, (x, tokens))


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
        for i in range(len(model.blocks)):
            block = place(model.blocks[i], mesh)
            xs = [apply_block(arch, block, x) for x in xs]
        found += [np.asarray(_cross_entropy(arch, ends, x, t), np.float64) for x, t in zip(xs, tokens, strict=True)]
    ce = np.concatenate(found)
    with np.errstate(over="ignore"):
        value = float(np.exp(np.mean(ce)))
    return Perplexity(value, ce, ce.size * (windows.shape[1] - 1))
