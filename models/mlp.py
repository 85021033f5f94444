"""A plain multi-layer perceptron with ReLU, as pure functions over a tuple of linears.

MLPRank was made for this network. Letters: n samples, u units of a hidden layer. The last linear
returns the logits, every other one a hidden layer.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.layers import Linear, linear

Params = tuple[Linear, ...]


def init(widths: Sequence[int], key: jax.Array) -> Params:
    """Initialise a network with normal weights and zero biases, float32.

    Source: He et al. 2015, eq. 10: weights have variance 2 / fan-in.

    Args:
      widths: Width of the input, of every hidden layer, and of the logits.
      key: Random key.

    Returns:
      The linears, weights [out in] and biases [out].
    """
    keys = jax.random.split(key, len(widths) - 1)
    return tuple(
        Linear(jax.random.normal(k, (out, fan_in)) * math.sqrt(2 / fan_in), jnp.zeros(out))
        for k, fan_in, out in zip(keys, widths[:-1], widths[1:], strict=True)
    )


def apply(params: Params, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run the network.

    Args:
      params: The network.
      x: Inputs, [n in].

    Returns:
      Logits [n out], and the activations [n u] of every hidden layer after its ReLU.
    """
    hidden = []
    for layer in params[:-1]:
        x = jax.nn.relu(linear(layer, x))
        hidden.append(x)
    return linear(params[-1], x), tuple(hidden)


def mask(params: Params, keeps: Sequence[jax.Array]) -> Params:
    """Set the rows and biases of dropped hidden units to zero.

    Args:
      params: The network.
      keeps: Units to keep, bool [u], one array a hidden layer.

    Returns:
      A network of the same shapes.
    """
    # The shapes stay, so one compilation serves every choice of units.
    hidden = [_mask_rows(layer, keep) for layer, keep in zip(params[:-1], keeps, strict=True)]
    return (*hidden, params[-1])


def _mask_rows(layer: Linear, keep: jax.Array) -> Linear:
    """Set rows [in] and biases of a linear to zero where `keep` [out] is false."""
    # The bias too: with a row of zeros alone, a unit would still fire.
    b = None if layer.b is None else jnp.where(keep, layer.b, 0)
    return Linear(jnp.where(keep[:, None], layer.w, 0), b)


def cut(params: Params, keeps: Sequence[np.ndarray]) -> Params:
    """Remove the dropped hidden units.

    A unit's row and bias leave its own linear, its column leaves the next one.

    Args:
      params: The network.
      keeps: Units to keep, bool [u], one array a hidden layer.

    Returns:
      A narrower network with the logits of `mask`.
    """
    keep_in = [np.ones(params[0].w.shape[1], bool), *keeps]
    keep_out = [*keeps, np.ones(params[-1].w.shape[0], bool)]
    return tuple(map(_cut_linear, params, keep_in, keep_out))


def _cut_linear(layer: Linear, keep_in: np.ndarray, keep_out: np.ndarray) -> Linear:
    """Keep the columns `keep_in` [in] and the rows `keep_out` [out] of a linear."""
    # On the host: on a device every new shape would cost a compilation.
    w = np.asarray(layer.w)[np.ix_(keep_out, keep_in)]
    b = None if layer.b is None else jnp.asarray(np.asarray(layer.b)[keep_out])
    return Linear(jnp.asarray(w), b)
