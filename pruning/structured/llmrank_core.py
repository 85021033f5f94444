"""LLM-Rank: importance of neurons as a centrality of the network's weighted graph. The mathematics; it sees arrays alone.

Hoffmann, Budhathoki & Kleindessner, "LLM-Rank: A Graph Theoretical Approach to Pruning Large Language Models", 2024, with MLPRank for
plain multi-layer perceptrons. A layer's outputs are nodes, |W| the weights of the edges from its inputs, and importance flows from
layer to layer: `prev` [in] is the importance of the inputs, normalised to sum one.

Letters: w = |W| [out in]; a_in [in] and a_out [out] norms of the layer's input and output activations; gamma the share of the graph
against the activations, theta the share of the weighted graph against the unweighted one (damping).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

SCORERS = ("wpr", "mpr", "norm", "activation", "wanda", "random")


class Layer(NamedTuple):
    """A linear as a piece of the graph. Arrays may carry a leading axis of blocks, for `flow`."""

    w: jax.Array  # |W| [out in]
    a_in: jax.Array  # [in]
    a_out: jax.Array  # [out]
    noise: jax.Array  # uniform [out]: what the random baseline ranks by


Scorer = Callable[
    [Layer, jax.Array], jax.Array
]  # (layer, prev [in]) -> importance [out], not yet normalised


def normalise(x: jax.Array) -> jax.Array:
    """x / sum(x); all-zero importance stays zero instead of turning into NaN."""
    total = jnp.sum(x)
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1.0), 0.0)


def column_normalised(w: jax.Array) -> jax.Array:
    """Each input's edges [out in] divided by their sum over outputs, so that it hands on all its importance; columns of zeros stay."""
    total = jnp.sum(w, axis=0, keepdims=True)
    return jnp.where(total > 0, w / jnp.where(total > 0, total, 1.0), 0.0)


def weighted_page_rank(gamma: float, theta: float, layer: Layer, prev: jax.Array) -> jax.Array:
    """One step of weighted PageRank with teleportation to the activations.

    gamma M prev + (1 - gamma) a_out / sum(a_out), with M = theta |W| / colsum + (1 - theta) A / colsum and A the adjacency (W != 0).
    With the released code's default gamma = 0 the graph vanishes and only the activations are left.
    """
    m = theta * column_normalised(layer.w) + (1 - theta) * column_normalised(
        (layer.w != 0).astype(jnp.float32)
    )
    return gamma * (m @ prev) + (1 - gamma) * normalise(layer.a_out)


def modified_page_rank(zeroed: float, layer: Layer, prev: jax.Array) -> jax.Array:
    """MLP-Rank's modified PageRank (|W| prev) * a_out, the `int(zeroed * in)` smallest entries of prev set to zero before
    (as if those inputs were already pruned)."""
    rank = jnp.argsort(jnp.argsort(prev, stable=True), stable=True)
    return (layer.w @ jnp.where(rank >= int(zeroed * prev.shape[0]), prev, 0.0)) * layer.a_out


def _norm(layer: Layer, prev: jax.Array) -> jax.Array:
    """L1 norm of each output's weights [out]: no data."""
    return jnp.sum(layer.w, axis=1)


def _activation(layer: Layer, prev: jax.Array) -> jax.Array:
    """Norm of the output activations [out]."""
    return layer.a_out


def _wanda(layer: Layer, prev: jax.Array) -> jax.Array:
    """Sum over inputs of |W| * norm of the input [out] (Sun et al. 2024, summed over a row)."""
    return layer.w @ layer.a_in


def _random(layer: Layer, prev: jax.Array) -> jax.Array:
    return layer.noise


@functools.cache
def scorer(name: str, gamma: float = 0.0, theta: float = 0.5, zeroed: float = 0.0) -> Scorer:
    """One of SCORERS with its parameters bound; equal arguments give the same function, for use as a static argument of jit."""
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
    """Importance handed on through layers of any widths: MLPRank, and the inside of one transformer block.

    Args:
      prev: importance of the first layer's inputs [in].
    Returns the last layer's importance, and every layer's [out], each of sum one.
    """
    found = []
    for layer in layers:
        prev = normalise(score(layer, normalise(prev)))
        found.append(prev)
    return prev, tuple(found)


class Ffn(NamedTuple):
    """A transformer block's feed-forward part as a piece of the graph; `d` residual channels, `f` neurons. Arrays may carry a leading
    axis of blocks. `gates` is empty without a gated activation."""

    up: jax.Array  # W [f d]
    gates: tuple[jax.Array, ...]  # each [f d]
    down: jax.Array  # W [d f]
    a_in: jax.Array  # norms of what enters [d]
    a_up: jax.Array  # of the output of up [f]
    a_mid: jax.Array  # of what the neurons send to down [f]
    a_down: jax.Array  # of the output of down [d]
    noise_up: jax.Array  # [f]
    noise_down: jax.Array  # [d]


Ranks = tuple[
    jax.Array, jax.Array
]  # importance of neurons [f] and of the channels they write [d], each of sum one
Centrality = Callable[
    [Ffn, jax.Array], tuple[jax.Array, Ranks]
]  # (block, carried [d]) -> (carried, ranks)


def _abs(w: jax.Array) -> jax.Array:
    return jnp.abs(w.astype(jnp.float32))


def official(score: Scorer, chained: bool, ffn: Ffn, prev: jax.Array) -> tuple[jax.Array, Ranks]:
    """The released code's graph: rows of up, then rows of down, each a node; gates and the columns of down are not part of it."""
    layers = (
        Layer(_abs(ffn.up), ffn.a_in, ffn.a_up, ffn.noise_up),
        Layer(_abs(ffn.down), ffn.a_mid, ffn.a_down, ffn.noise_down),
    )
    last, (up, down) = chain(score, layers, prev if chained else ffn.a_in)
    return last, (up, down)


def _in_edges(ffn: Ffn) -> jax.Array:
    """Edges from the residual channels into whole neurons [f d]: the mean of |W| over up and its gates."""
    return sum((_abs(g) for g in ffn.gates), start=_abs(ffn.up)) / (1 + len(ffn.gates))


def reverse_page_rank(
    gamma: float, theta: float, chained: bool, ffn: Ffn, rho: jax.Array
) -> tuple[jax.Array, Ranks]:
    """Weighted PageRank on the graph of whole neurons and residual channels, followed from the outputs back.

    A neuron matters by what it sends, |W_down| times the norm of its activation, to channels that matter, and by its activation itself:
    n = gamma normalised(a_mid * |W_down|^T rho) + (1 - gamma) normalised(a_mid). It hands its rank to the channels it reads in proportion
    to the weights of its edges, M = theta |W| / colsum + (1 - theta) A / colsum over what enters the neurons, and the residual stream
    keeps the other half: rho <- (rho + normalised(M^T n)) / 2. Channels that a block writes are ranked alike, by a_down and rho.
    gamma = 0 is the norm of the activations; not `chained`, every block sees a uniform rho.
    """
    rho = normalise(rho) if chained else jnp.full_like(rho, 1 / rho.shape[0])
    neurons = gamma * normalise(ffn.a_mid * (rho @ _abs(ffn.down))) + (1 - gamma) * normalise(
        ffn.a_mid
    )
    channels = gamma * normalise(ffn.a_down * rho) + (1 - gamma) * normalise(ffn.a_down)
    w = _in_edges(ffn)
    m = theta * column_normalised(w) + (1 - theta) * column_normalised((w != 0).astype(jnp.float32))
    return (rho + normalise(neurons @ m)) / 2, (neurons, channels)


def modified_forward(
    zeroed: float, chained: bool, ffn: Ffn, prev: jax.Array
) -> tuple[jax.Array, Ranks]:
    """Modified PageRank on whole neurons: what reaches a neuron through all its incoming edges, times its activation, times what
    leaves it. Channels are ranked as in `modified_page_rank`."""
    start = normalise(prev if chained else ffn.a_in)
    reached = normalise(
        modified_page_rank(zeroed, Layer(_in_edges(ffn), ffn.a_in, ffn.a_mid, ffn.noise_up), start)
    )
    down = _abs(ffn.down)
    channels = normalise(
        modified_page_rank(zeroed, Layer(down, ffn.a_mid, ffn.a_down, ffn.noise_down), reached)
    )
    return channels, (normalise(reached * jnp.sum(down, axis=0)), channels)


def _baseline(
    neurons: Callable[[Ffn], jax.Array],
    channels: Callable[[Ffn], jax.Array],
    ffn: Ffn,
    prev: jax.Array,
) -> tuple[jax.Array, Ranks]:
    return prev, (normalise(neurons(ffn)), normalise(channels(ffn)))


def _norm_of_neuron(ffn: Ffn) -> jax.Array:
    return jnp.sum(_in_edges(ffn), axis=1) * (1 + len(ffn.gates)) + jnp.sum(_abs(ffn.down), axis=0)


@functools.cache
def corrected_centrality(
    name: str, gamma: float, theta: float, zeroed: float, chained: bool
) -> Centrality:
    """One of SCORERS on the graph whose nodes are whole neurons (up and gate rows with their down column)."""
    known: dict[str, Centrality] = {
        "wpr": functools.partial(reverse_page_rank, gamma, theta, chained),
        "mpr": functools.partial(modified_forward, zeroed, chained),
        "norm": functools.partial(
            _baseline, _norm_of_neuron, lambda b: jnp.sum(_abs(b.down), axis=1)
        ),
        "activation": functools.partial(_baseline, lambda b: b.a_mid, lambda b: b.a_down),
        "wanda": functools.partial(
            _baseline,
            lambda b: b.a_mid * jnp.sum(_abs(b.down), axis=0),
            lambda b: _abs(b.down) @ b.a_mid,
        ),
        "random": functools.partial(_baseline, lambda b: b.noise_up, lambda b: b.noise_down),
    }
    return known[name]


@functools.cache
def official_centrality(
    name: str, gamma: float, theta: float, zeroed: float, chained: bool
) -> Centrality:
    """One of SCORERS on the released code's graph."""
    return functools.partial(official, scorer(name, gamma, theta, zeroed), chained)


def flow(
    centrality: Centrality, backward: bool, blocks: Ffn, carried: jax.Array
) -> tuple[jax.Array, Ranks]:
    """Importance along blocks of equal widths, as one scan.

    Args:
      centrality: from `corrected_centrality` or `official_centrality`.
      backward: from the last block to the first.
      blocks: the arrays of all blocks stacked [blocks ...].
      carried: importance of the residual channels where the walk begins [d].
    Returns the importance carried out of the last step [d], and the ranks of neurons [blocks f] and channels [blocks d].
    """
    return jax.lax.scan(
        lambda carry, block: centrality(block, carry), carried, blocks, reverse=backward
    )
