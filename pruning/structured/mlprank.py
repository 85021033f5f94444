"""MLPRank: rank the hidden units of a plain multi-layer perceptron, layer by layer.

Source: Hoffmann 2024, "MLP-Rank: A Graph Theoretical Approach to Pruning Deep Neural Networks", the
predecessor of LLM-Rank. A node is a hidden unit, an edge the |W| between two units, and importance
flows from the inputs forward. The output layer is not ranked: its units are the classes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models import mlp
from models.errors import InputError
from pruning.structured.page_rank_core import SCORERS, Layer, Scorer, chain, scorer


class Sample(NamedTuple):
    """Data that the scores are computed from.

    Attributes:
      x: Calibration inputs, [n in].
      key: Random key of the random baseline.
    """

    x: jax.Array
    key: jax.Array


def wpr(gamma: float = 0.9, theta: float = 0.5) -> Scorer:
    """Return the weighted PageRank scorer.

    Args:
      gamma: Share of the graph against the activations, 0 to 1.
      theta: Share of the weighted edges against unweighted ones, 0 to 1.

    Raises:
      InputError: A share is outside 0 to 1.
    """
    # The default damping is that of the official MLP-Rank code. LLM-Rank's official default,
    # gamma = 0, would leave the activations alone.
    for name, share in (("gamma", gamma), ("theta", theta)):
        if not 0 <= share <= 1:
            raise InputError("of wpr must lie between 0 and 1", field=name, value=share)
    return scorer("wpr", gamma, theta)


def mpr(zeroed: float = 0.0) -> Scorer:
    """Return the modified PageRank scorer.

    Args:
      zeroed: Fraction of a layer's least important inputs that pass on no importance, 0 to below 1.

    Raises:
      InputError: The fraction is outside its range.
    """
    if not 0 <= zeroed < 1:
        raise InputError(
            "of mpr must lie between 0 and 1, 1 excluded", field="zeroed", value=zeroed
        )
    return scorer("mpr", zeroed=zeroed)


def _baseline(name: str) -> Callable[[], Scorer]:
    """Return the maker of a scorer without parameters."""

    def make() -> Scorer:
        return scorer(name)

    return make


MAKERS: dict[str, Callable[..., Scorer]] = {name: _baseline(name) for name in SCORERS} | {
    "wpr": wpr,
    "mpr": mpr,
}


@functools.partial(jax.jit, static_argnums=0)
def importance(score: Scorer, params: mlp.Params, sample: Sample) -> tuple[jax.Array, ...]:
    """Score the hidden units.

    Args:
      score: The scorer; equal scorers share one compilation.
      params: The network.
      sample: Calibration inputs.

    Returns:
      Importance [u] of every hidden layer's units; each layer sums to one.
    """
    # Norms over the samples, of the inputs and of every hidden layer after its ReLU.
    norms = [jnp.linalg.norm(a, axis=0) for a in (sample.x, *mlp.apply(params, sample.x)[1])]
    layers = []
    for i, (p, a_in, a_out) in enumerate(zip(params[:-1], norms[:-1], norms[1:], strict=True)):
        # A key of its own for every layer: with one key, layers of equal width would tie.
        noise = jax.random.uniform(jax.random.fold_in(sample.key, i), a_out.shape)
        layers.append(Layer(jnp.abs(p.w), a_in, a_out, noise))
    # The first layer's `prev` is the norm of its inputs.
    return chain(score, layers, norms[0])[1]
