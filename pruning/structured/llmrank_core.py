"""LLM-Rank: importance of neurons as a centrality of the network's weighted graph.

Source: Hoffmann, Budhathoki & Kleindessner, "LLM-Rank: A Graph Theoretical Approach to Pruning
Large Language Models", 2024. A block's feed-forward part is a part of the graph, and importance
flows from block to block along the residual channels.

Letters: d residual channels; f neurons; rho and prev [d] importance of the channels; gamma the
share of the graph against the activations; theta the share of the weighted graph against the
unweighted one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from pruning.structured.page_rank_core import (
    Layer,
    Scorer,
    chain,
    modified_page_rank,
    normalise,
    scorer,
    transition,
)


class Ffn(NamedTuple):
    """A block's feed-forward part as a part of the graph.

    For `flow` every array has a leading axis of blocks.

    Attributes:
      up: Weights into the neurons [f d].
      gates: Weights of the gates, each [f d]; empty without a gated activation.
      down: Weights out of the neurons [d f].
      a_in: Norms of the part's input [d].
      a_up: Norms of the output of up [f].
      a_mid: Norms of the neurons' activations, the input of down [f].
      a_down: Norms of the output of down [d].
      noise_up: Uniform noise for neurons [f].
      noise_down: Uniform noise for channels [d].
    """

    up: jax.Array
    gates: tuple[jax.Array, ...]
    down: jax.Array
    a_in: jax.Array
    a_up: jax.Array
    a_mid: jax.Array
    a_down: jax.Array
    noise_up: jax.Array
    noise_down: jax.Array


# Importance of neurons [f] and of the channels they write [d], each of sum one.
Ranks = tuple[jax.Array, jax.Array]
# (block, carried [d]) -> (carried [d], ranks)
Centrality = Callable[[Ffn, jax.Array], tuple[jax.Array, Ranks]]


def _check_shapes(ffn: Ffn) -> None:
    """Check that the arrays of one block fit together."""
    f, d = ffn.up.shape
    chex.assert_shape([ffn.up, *ffn.gates], (f, d))
    chex.assert_shape(ffn.down, (d, f))
    chex.assert_shape([ffn.a_up, ffn.a_mid, ffn.noise_up], (f,))
    chex.assert_shape([ffn.a_in, ffn.a_down, ffn.noise_down], (d,))


def _abs(w: jax.Array) -> jax.Array:
    """Return |W| in float32, whatever the weights' type: sums of bfloat16 lose small edges."""
    return jnp.abs(w.astype(jnp.float32))


def rank_official_graph(
    score: Scorer, chained: bool, ffn: Ffn, prev: jax.Array
) -> tuple[jax.Array, Ranks]:
    """Rank rows of up, then rows of down, as the official code does.

    Gates and the columns of down are not part of its graph.

    Args:
      score: Scorer of one layer.
      chained: Whether to start from the importance carried here; else from the input's norms.
      ffn: The block.
      prev: Importance carried here [d].

    Returns:
      Importance of the rows of down [d], and the ranks.
    """
    _check_shapes(ffn)
    layers = (
        Layer(_abs(ffn.up), ffn.a_in, ffn.a_up, ffn.noise_up),
        Layer(_abs(ffn.down), ffn.a_mid, ffn.a_down, ffn.noise_down),
    )
    with jax.named_scope("official_centrality"):
        # Unchained, the official code starts each block from the norms of its inputs.
        last, (up, down) = chain(score, layers, prev if chained else ffn.a_in)
    return last, (up, down)


def _in_edges(ffn: Ffn) -> jax.Array:
    """Return the edges into whole neurons [f d]: the mean of |W| over up and its gates."""
    return sum((_abs(g) for g in ffn.gates), start=_abs(ffn.up)) / (1 + len(ffn.gates))


def reverse_page_rank(
    gamma: float, theta: float, chained: bool, ffn: Ffn, rho: jax.Array
) -> tuple[jax.Array, Ranks]:
    """Take one step of weighted PageRank on whole neurons, from the outputs back.

    A neuron matters by its activation, and by the weights |W_down| with which it writes to channels
    that matter: n = gamma normalised(a_mid * |W_down|^T rho) + (1 - gamma) normalised(a_mid).
    It hands its rank to the channels it reads in proportion to its edges, and the residual stream
    keeps the other half: rho <- (rho + normalised(M^T n)) / 2. Channels that a block writes are
    ranked alike, by a_down and rho.

    Args:
      gamma: Share of the graph; 0 ranks by the norm of the activations.
      theta: Share of the weighted edges in M.
      chained: Whether rho comes from the blocks above; else it is uniform.
      ffn: The block.
      rho: Importance of the channels that the block writes to [d].

    Returns:
      Importance of the channels that it reads [d], and the ranks.
    """
    _check_shapes(ffn)
    # Below a block of zeros the carried importance sums to less than one.
    rho = normalise(rho) if chained else jnp.full_like(rho, 1 / rho.shape[0])
    with jax.named_scope("centrality"):
        sent = normalise(ffn.a_mid * (rho @ _abs(ffn.down)))
        neurons = gamma * sent + (1 - gamma) * normalise(ffn.a_mid)
        channels = gamma * normalise(ffn.a_down * rho) + (1 - gamma) * normalise(ffn.a_down)
    with jax.named_scope("carry"):
        m = transition(theta, _in_edges(ffn))
        # Half stays on the residual stream, which passes the block by.
        carried = (rho + normalise(neurons @ m)) / 2
    return carried, (neurons, channels)


def modified_forward(
    zeroed: float, chained: bool, ffn: Ffn, prev: jax.Array
) -> tuple[jax.Array, Ranks]:
    """Take one step of modified PageRank on whole neurons.

    A neuron's rank is what reaches it through all its incoming edges, times its activation, times
    the sum of its outgoing edges. Channels are ranked as in `modified_page_rank`.

    Args:
      zeroed: Fraction of the lowest importance to zero before each step.
      chained: Whether to start from the importance carried here; else from the input's norms.
      ffn: The block.
      prev: Importance of the residual channels [d].

    Returns:
      Importance of the channels that the block writes [d], and the ranks.
    """
    _check_shapes(ffn)
    with jax.named_scope("centrality"):
        start = normalise(prev if chained else ffn.a_in)
        into = Layer(_in_edges(ffn), ffn.a_in, ffn.a_mid, ffn.noise_up)
        # Normalised at every step: products of norms along many blocks would overflow.
        reached = normalise(modified_page_rank(zeroed, into, start))
        down = _abs(ffn.down)
        out = Layer(down, ffn.a_mid, ffn.a_down, ffn.noise_down)
        channels = normalise(modified_page_rank(zeroed, out, reached))
        # LLM-Rank's own score stops at what reaches a neuron. A neuron that writes little matters
        # little, so its outgoing edges count too.
        return channels, (normalise(reached * jnp.sum(down, axis=0)), channels)


def _rank_alone(
    neurons: Callable[[Ffn], jax.Array],
    channels: Callable[[Ffn], jax.Array],
    ffn: Ffn,
    prev: jax.Array,
) -> tuple[jax.Array, Ranks]:
    """Rank a block by a baseline, which carries nothing from block to block."""
    _check_shapes(ffn)
    return prev, (normalise(neurons(ffn)), normalise(channels(ffn)))


def _norm_of_neurons(ffn: Ffn) -> jax.Array:
    """Return the L1 norm of all weights of each neuron [f]."""
    # `_in_edges` is a mean; the norm is over the sum.
    incoming = jnp.sum(_in_edges(ffn), axis=1) * (1 + len(ffn.gates))
    return incoming + jnp.sum(_abs(ffn.down), axis=0)


def _norm_of_channels(ffn: Ffn) -> jax.Array:
    """Return the L1 norm of each row of down [d]."""
    return jnp.sum(_abs(ffn.down), axis=1)


def _wanda_of_neurons(ffn: Ffn) -> jax.Array:
    """Return Wanda's score summed over each neuron's outgoing weights [f]."""
    return ffn.a_mid * jnp.sum(_abs(ffn.down), axis=0)


def _wanda_of_channels(ffn: Ffn) -> jax.Array:
    """Return Wanda's score summed over each row of down [d]."""
    return _abs(ffn.down) @ ffn.a_mid


# Cached as `scorer` is: a static argument of jit.
@functools.cache
def corrected_centrality(
    name: str, gamma: float, theta: float, zeroed: float, chained: bool
) -> Centrality:
    """Return the centrality on the graph of whole neurons.

    A node is a row of up and of the gates with its column of down.

    Args:
      name: One of SCORERS.
      gamma: Share of the graph in "wpr".
      theta: Share of the weighted edges in "wpr".
      zeroed: Fraction of the importance that "mpr" zeroes.
      chained: Whether importance flows from block to block.
    """
    known: dict[str, Centrality] = {
        "wpr": functools.partial(reverse_page_rank, gamma, theta, chained),
        "mpr": functools.partial(modified_forward, zeroed, chained),
        "norm": functools.partial(_rank_alone, _norm_of_neurons, _norm_of_channels),
        "activation": functools.partial(_rank_alone, lambda b: b.a_mid, lambda b: b.a_down),
        "wanda": functools.partial(_rank_alone, _wanda_of_neurons, _wanda_of_channels),
        "random": functools.partial(_rank_alone, lambda b: b.noise_up, lambda b: b.noise_down),
    }
    return known[name]


@functools.cache
def official_centrality(
    name: str, gamma: float, theta: float, zeroed: float, chained: bool
) -> Centrality:
    """Return the centrality on the official code's graph.

    Args:
      name: One of SCORERS.
      gamma: Share of the graph in "wpr".
      theta: Share of the weighted edges in "wpr".
      zeroed: Fraction of the importance that "mpr" zeroes.
      chained: Whether importance flows from block to block.
    """
    return functools.partial(rank_official_graph, scorer(name, gamma, theta, zeroed), chained)


def flow(
    centrality: Centrality, backward: bool, blocks: Ffn, carried: jax.Array
) -> tuple[jax.Array, Ranks]:
    """Carry importance along blocks of equal widths.

    Args:
      centrality: From `corrected_centrality` or `official_centrality`.
      backward: Whether to go from the last block to the first.
      blocks: All blocks, every array stacked [blocks ...].
      carried: Importance of the residual channels before the first step [d].

    Returns:
      Importance carried out of the last step [d], and the ranks of neurons [blocks f] and of
      channels [blocks d].
    """
    chex.assert_rank([blocks.up, blocks.down, *blocks.gates], 3)
    chex.assert_equal_shape_prefix(jax.tree.leaves(blocks), 1)
    chex.assert_shape(carried, blocks.a_in.shape[1:])

    def step(carry: jax.Array, block: Ffn) -> tuple[jax.Array, Ranks]:
        return centrality(block, carry)

    # A scan compiles one block, whatever their number.
    return jax.lax.scan(step, carried, blocks, reverse=backward)
