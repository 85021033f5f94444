"""A plain multi-layer perceptron with ReLU, as pure functions over a tuple of linears; the network that MLPRank was made for.

Letters: n samples, u units of a hidden layer. The last linear gives the logits, every other one a hidden layer.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.layers import Linear, linear

Params = tuple[Linear, ...]


def init(widths: Sequence[int], key: jax.Array) -> Params:
    """Normal weights of variance 2 / fan-in (He et al. 2015, eq. 10) and zero biases, float32.

    Args:
      widths: of the input, of each hidden layer, of the logits.
    """
    keys = jax.random.split(key, len(widths) - 1)
    return tuple(
        Linear(jax.random.normal(k, (out, fan_in)) * math.sqrt(2 / fan_in), jnp.zeros(out))
        for k, fan_in, out in zip(keys, widths[:-1], widths[1:], strict=True)
    )


def apply(params: Params, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """x [n in] -> (logits [n out], every hidden layer's activations [n u], after the ReLU)."""
    hidden = []
    for p in params[:-1]:
        x = jax.nn.relu(linear(p, x))
        hidden.append(x)
    return linear(params[-1], x), tuple(hidden)


def mask(params: Params, keeps: Sequence[jax.Array]) -> Params:
    """The network with the hidden units that `keeps` (bool [u], one a hidden layer) drops silenced: rows and biases zero.

    The shapes stay, so one compilation serves every choice of units.
    """

    def silence(p: Linear, keep: jax.Array) -> Linear:
        return Linear(
            jnp.where(keep[:, None], p.w, 0), None if p.b is None else jnp.where(keep, p.b, 0)
        )

    return (*(silence(p, keep) for p, keep in zip(params[:-1], keeps, strict=True)), params[-1])


def cut(params: Params, keeps: Sequence[np.ndarray]) -> Params:
    """The network without the hidden units that `keeps` (bool [u], one a hidden layer) drops: the same logits as `mask`.

    A unit goes as a whole: its row and bias in its own linear, its column in the next. On the host, where new shapes cost no
    compilation.
    """
    ins = [np.ones(params[0].w.shape[1], bool), *keeps]
    outs = [*keeps, np.ones(params[-1].w.shape[0], bool)]

    def part(p: Linear, in_: np.ndarray, out: np.ndarray) -> Linear:
        b = None if p.b is None else jnp.asarray(np.asarray(p.b)[out])
        return Linear(jnp.asarray(np.asarray(p.w)[np.ix_(out, in_)]), b)

    return tuple(map(part, params, ins, outs))
