"""Importance of a layer's outputs, from the importance of its inputs.

A layer's outputs are nodes of a graph, |W| the weights of the edges from its inputs. LLM-Rank and
MLPRank carry importance along such layers.

Letters: w = |W| [out in]; prev [in] importance of the inputs, of sum one; a_in [in] and a_out [out]
norms of the layer's input and output activations; gamma the share of the graph against the
activations; theta the share of the weighted graph against the unweighted one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

SCORERS = ("wpr", "mpr", "norm", "activation", "wanda", "random")


class Layer(NamedTuple):
    """A linear as a part of the graph.

    Attributes:
      w: Weights of the edges, |W| [out in].
      a_in: Norm of each input [in].
      a_out: Norm of each output [out].
      noise: Uniform noise that the random baseline ranks by [out].
    """

    w: jax.Array
    a_in: jax.Array
    a_out: jax.Array
    noise: jax.Array


Scorer = Callable[[Layer, jax.Array], jax.Array]  # (layer, prev [in]) -> importance [out], any sum


def normalise(x: jax.Array) -> jax.Array:
    """Divide by the sum; importance of zeros stays zero.

    Args:
      x: Importance [n], not negative.
    """
    total = jnp.sum(x)
    # The inner `where` keeps the division finite, where a NaN would spread to every later block.
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1.0), 0.0)


def column_normalised(w: jax.Array) -> jax.Array:
    """Divide each input's edges by their sum over outputs; columns of zeros stay zero.

    Every input then hands on all its importance, and no more.

    Args:
      w: Weights of the edges [out in], not negative.
    """
    total = jnp.sum(w, axis=0, keepdims=True)
    return jnp.where(total > 0, w / jnp.where(total > 0, total, 1.0), 0.0)


def transition(theta: float, w: jax.Array) -> jax.Array:
    """Return M = theta |W| / colsum + (1 - theta) A / colsum with A the adjacency (W != 0).

    Args:
      theta: Share of the weighted edges.
      w: Weights of the edges, |W| [out in].

    Returns:
      Share of input j's importance that output i gets [out in].
    """
    edges = (w != 0).astype(jnp.float32)
    return theta * column_normalised(w) + (1 - theta) * column_normalised(edges)


def weighted_page_rank(gamma: float, theta: float, layer: Layer, prev: jax.Array) -> jax.Array:
    """Take one step of weighted PageRank with teleportation to the activations.

    gamma M prev + (1 - gamma) a_out / sum(a_out). With the official default gamma = 0 the graph
    vanishes and only the activations are left.

    Args:
      gamma: Share of the graph.
      theta: Share of the weighted edges in M.
      layer: The linear.
      prev: Importance of its inputs [in].

    Returns:
      Importance of its outputs [out].
    """
    m = transition(theta, layer.w)
    return gamma * (m @ prev) + (1 - gamma) * normalise(layer.a_out)


def modified_page_rank(zeroed: float, layer: Layer, prev: jax.Array) -> jax.Array:
    """Take one step of modified PageRank, (|W| prev) * a_out.

    Args:
      zeroed: Fraction of the lowest entries of `prev` to zero first, as if pruned already.
      layer: The linear.
      prev: Importance of its inputs [in].

    Returns:
      Importance of its outputs [out], not normalised.
    """
    # Two argsorts give ranks, so that ties fall by position and the count is met exactly.
    rank = jnp.argsort(jnp.argsort(prev, stable=True), stable=True)
    lowest = int(zeroed * prev.shape[0])  # truncated, as in the official code
    return (layer.w @ jnp.where(rank >= lowest, prev, 0.0)) * layer.a_out


def _norm(layer: Layer, prev: jax.Array) -> jax.Array:
    """Return the L1 norm of each output's weights [out]."""
    return jnp.sum(layer.w, axis=1)


def _activation(layer: Layer, prev: jax.Array) -> jax.Array:
    """Return the norm of each output's activations [out]."""
    return layer.a_out


def _wanda(layer: Layer, prev: jax.Array) -> jax.Array:
    """Return Wanda's score summed over each output's weights [out]."""
    return layer.w @ layer.a_in


def _random(layer: Layer, prev: jax.Array) -> jax.Array:
    """Return the noise [out]."""
    return layer.noise


# Cached, so that equal arguments give the same function: it is a static argument of jit, and a
# fresh one would compile again.
@functools.cache
def scorer(name: str, gamma: float = 0.0, theta: float = 0.5, zeroed: float = 0.0) -> Scorer:
    """Return the scorer of this name with its parameters bound.

    Args:
      name: One of SCORERS.
      gamma: Share of the graph in "wpr".
      theta: Share of the weighted edges in "wpr".
      zeroed: Fraction of the inputs that "mpr" zeroes.
    """
    known: dict[str, Scorer] = {
        "wpr": functools.partial(weighted_page_rank, gamma, theta),
        "mpr": functools.partial(modified_page_rank, zeroed),
        "norm": _norm,
        "activation": _activation,
        "wanda": _wanda,
        "random": _random,
    }
    return known[name]


def chain(
    score: Scorer, layers: Sequence[Layer], prev: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Hand importance on through layers of any widths.

    Args:
      score: Scorer of one layer.
      layers: The linears, each reading the one before.
      prev: Importance of the first layer's inputs [in].

    Returns:
      Importance of the last layer [out], and of every layer [out]; each of sum one.
    """
    chex.assert_rank(prev, 1)
    ranks = []
    for layer in layers:
        chex.assert_shape(layer.w, (*layer.a_out.shape, *layer.a_in.shape))
        prev = normalise(score(layer, normalise(prev)))
        ranks.append(prev)
    return prev, tuple(ranks)
