"""LLM-Rank (Hoffmann et al. 2024) in float64 NumPy, with edges summed one by one.

`official*` is what the authors' code computes, on rows of up and down. `corrected` has the same
centralities on whole neurons: one node for the rows of up and gate with the column of down.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Graph(NamedTuple):
    """Feed-forward part of a block: weights [f d], [f d]..., [d f], and norms of activations."""

    up: np.ndarray
    gates: tuple[np.ndarray, ...]
    down: np.ndarray
    a_in: np.ndarray
    a_up: np.ndarray
    a_mid: np.ndarray
    a_down: np.ndarray


class Settings(NamedTuple):
    """A scorer and its parameters."""

    name: str
    gamma: float = 0.0
    theta: float = 0.5
    zeroed: float = 0.0


Pair = tuple[np.ndarray, np.ndarray]  # importance of rows of up (or neurons) and of rows of down


def share(x: np.ndarray) -> np.ndarray:
    """Return each entry's share of the sum; zeros stay zeros."""
    return x / x.sum() if x.sum() > 0 else np.zeros_like(x)


def transition(w: np.ndarray, theta: float) -> np.ndarray:
    """Return the share of input j's importance that goes to output i [out in].

    A share theta goes by weight, the rest equally to all edges.
    """
    m = np.zeros(w.shape)
    for j in range(w.shape[1]):
        column, edges = np.abs(w[:, j]), (w[:, j] != 0).astype(np.float64)
        if column.sum() > 0:
            m[:, j] = theta * column / column.sum() + (1 - theta) * edges / edges.sum()
    return m


def without_lowest(prev: np.ndarray, zeroed: float) -> np.ndarray:
    """Return a copy with the `int(zeroed * len)` smallest entries zero."""
    out = prev.copy()
    out[np.argsort(prev, kind="stable")[: int(len(prev) * zeroed)]] = 0
    return out


def row_scores(
    s: Settings, w: np.ndarray, a_in: np.ndarray, a_out: np.ndarray, prev: np.ndarray
) -> np.ndarray:
    """Return the importance of one linear's rows, of sum one."""
    match s.name:
        case "norm":
            scores = np.array([np.abs(row).sum() for row in w])
        case "activation":
            scores = a_out
        case "wanda":
            scores = np.array([sum(abs(row[j]) * a_in[j] for j in range(len(row))) for row in w])
        case "mpr":
            prev = without_lowest(prev, s.zeroed)
            scores = (
                np.array([sum(abs(row[j]) * prev[j] for j in range(len(row))) for row in w]) * a_out
            )
        case "wpr":
            m = transition(w, s.theta)
            scores = s.gamma * np.array([row @ prev for row in m]) + (1 - s.gamma) * share(a_out)
    return share(scores)


def official(s: Settings, graphs: Sequence[Graph], chained: bool) -> list[Pair]:
    """Return the importance along up_0, down_0, up_1, ...; unchained, every block starts anew."""
    pairs: list[Pair] = []
    prev = share(graphs[0].a_in)
    for g in graphs:
        if not chained:
            prev = share(g.a_in)
        up = row_scores(s, g.up, g.a_in, g.a_up, prev)
        prev = row_scores(s, g.down, g.a_mid, g.a_down, up)
        pairs.append((up, prev))
    return pairs


def official_global_counts(pairs: Sequence[Pair], amount: float) -> list[int]:
    """Count the rows of each linear that are among the `ceil(amount * rows)` lowest of all."""
    ranked = sorted(
        (value, i) for i, scores in enumerate(x for pair in pairs for x in pair) for value in scores
    )
    lowest = [i for _, i in ranked[: math.ceil(len(ranked) * amount)]]
    return [lowest.count(i) for i in range(2 * len(pairs))]


def entering(g: Graph) -> np.ndarray:
    """Return the weights of the edges into whole neurons [f d]: the mean over up and gates."""
    return np.mean([np.abs(w) for w in (g.up, *g.gates)], axis=0)


def _backward(s: Settings, graphs: Sequence[Graph], chained: bool) -> list[Pair]:
    d = len(graphs[0].a_in)
    rho = np.full(d, 1 / d)
    pairs: list[Pair] = []
    for g in reversed(graphs):
        rho = rho if chained else np.full(d, 1 / d)
        f = len(g.a_mid)
        sent = share(
            np.array(
                [g.a_mid[k] * sum(abs(g.down[c, k]) * rho[c] for c in range(d)) for k in range(f)]
            )
        )
        neurons = s.gamma * sent + (1 - s.gamma) * share(g.a_mid)
        pairs.append((neurons, s.gamma * share(g.a_down * rho) + (1 - s.gamma) * share(g.a_down)))
        m = transition(entering(g), s.theta)
        rho = 0.5 * rho + 0.5 * share(
            np.array([sum(m[k, c] * neurons[k] for k in range(f)) for c in range(d)])
        )
    return pairs[::-1]


def _forward(s: Settings, graphs: Sequence[Graph], chained: bool) -> list[Pair]:
    pairs: list[Pair] = []
    prev = share(graphs[0].a_in)
    for g in graphs:
        prev = prev if chained else share(g.a_in)
        into = share((entering(g) @ without_lowest(prev, s.zeroed)) * g.a_mid)
        prev = share((np.abs(g.down) @ without_lowest(into, s.zeroed)) * g.a_down)
        pairs.append((share(into * np.abs(g.down).sum(axis=0)), prev))
    return pairs


def _alone(s: Settings, g: Graph) -> Pair:
    down = np.abs(g.down)
    match s.name:
        case "norm":
            neurons = sum(np.abs(w).sum(axis=1) for w in (g.up, *g.gates)) + down.sum(axis=0)
            return share(neurons), share(down.sum(axis=1))
        case "activation":
            return share(g.a_mid), share(g.a_down)
        case "wanda":
            scores = down * g.a_mid[None, :]  # Wanda's score of every outgoing weight
            return share(scores.sum(axis=0)), share(scores.sum(axis=1))
    raise KeyError(s.name)


def corrected(s: Settings, graphs: Sequence[Graph], chained: bool) -> list[Pair]:
    """Return the importance of whole neurons and of the channels they write."""
    if s.name in ("wpr", "mpr"):
        return (_backward if s.name == "wpr" else _forward)(s, graphs, chained)
    return [_alone(s, g) for g in graphs]
