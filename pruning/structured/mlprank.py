"""MLPRank: the chain of LLM-Rank over the hidden layers of a plain multi-layer perceptron.

Hoffmann, "MLP-Rank: A Graph Theoretical Approach to Pruning Deep Neural Networks", 2024, the predecessor of LLM-Rank. A node is a
hidden unit, an edge the |W| between two units, and importance flows from the inputs forward. The output layer is not ranked: its
units are the classes.
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
    """What the ranks are taken from."""

    x: jax.Array  # calibration inputs [n in]
    key: jax.Array  # of the random baseline


def wpr(gamma: float = 0.9, theta: float = 0.5) -> Scorer:
    """Weighted PageRank, with the damping of the released MLP-Rank code (LLM-Rank's gamma = 0 leaves the activations alone).

    Args:
      gamma: share of the graph against the activations, 0 to 1.
      theta: share of the weighted edges against unweighted ones, 0 to 1.
    """
    if not (0 <= gamma <= 1 and 0 <= theta <= 1):
        raise InputError(f"wpr(gamma={gamma}, theta={theta}): both must lie between 0 and 1")
    return scorer("wpr", gamma, theta)


def mpr(zeroed: float = 0.0) -> Scorer:
    """Modified PageRank; the fraction `zeroed`, 0 to below 1, of a layer's least important inputs hands on nothing."""
    if not 0 <= zeroed < 1:
        raise InputError(f"mpr(zeroed={zeroed}) must lie between 0 and 1, without 1")
    return scorer("mpr", zeroed=zeroed)


def _baseline(name: str) -> Callable[[], Scorer]:
    def make() -> Scorer:
        return scorer(name)

    return make


MAKERS: dict[str, Callable[..., Scorer]] = {name: _baseline(name) for name in SCORERS} | {
    "wpr": wpr,
    "mpr": mpr,
}


@functools.partial(jax.jit, static_argnums=0)
def importance(score: Scorer, params: mlp.Params, sample: Sample) -> tuple[jax.Array, ...]:
    """Every hidden layer's importance [u], each of sum one.

    The norms of activations are over the sample's inputs and after the ReLU; the first layer's `prev` is the norm of its inputs.
    """
    norms = [jnp.linalg.norm(a, axis=0) for a in (sample.x, *mlp.apply(params, sample.x)[1])]
    layers = [
        Layer(
            jnp.abs(p.w),
            a_in,
            a_out,
            jax.random.uniform(jax.random.fold_in(sample.key, i), a_out.shape),
        )
        for i, (p, a_in, a_out) in enumerate(zip(params[:-1], norms[:-1], norms[1:], strict=True))
    ]
    return chain(score, layers, norms[0])[1]
