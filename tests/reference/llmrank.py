"""LLM-Rank in float64 NumPy, with edges summed one by one.

Source: Hoffmann et al. 2024. `released*` follows the authors' code, on rows of up and down.
`whole*` has the same centralities on whole neurons: one node for the rows of up and gate with the
column of down.
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


def handed_on(w: np.ndarray, theta: float) -> np.ndarray:
    """Return the share of input j's importance that goes to output i, [out in].

    A fraction theta is shared by weight, the rest equally among the edges.
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
    """Return one linear's importance of rows, of sum one."""
    match s.name:
        case "norm":
            found = np.array([np.abs(row).sum() for row in w])
        case "activation":
            found = a_out
        case "wanda":
            found = np.array([sum(abs(row[j]) * a_in[j] for j in range(len(row))) for row in w])
        case "mpr":
            prev = without_lowest(prev, s.zeroed)
            found = (
                np.array([sum(abs(row[j]) * prev[j] for j in range(len(row))) for row in w]) * a_out
            )
        case "wpr":
            m = handed_on(w, s.theta)
            found = s.gamma * np.array([row @ prev for row in m]) + (1 - s.gamma) * share(a_out)
    return share(found)


def released(s: Settings, graphs: Sequence[Graph], chained: bool) -> list[Pair]:
    """Return importance along up_0, down_0, up_1, ...

    It is one list, or a list a block; each begins with the norms of its input.
    """
    found, prev = [], share(graphs[0].a_in)
    for g in graphs:
        if not chained:
            prev = share(g.a_in)
        up = row_scores(s, g.up, g.a_in, g.a_up, prev)
        prev = row_scores(s, g.down, g.a_mid, g.a_down, up)
        found.append((up, prev))
    return found


def released_global_counts(pairs: Sequence[Pair], amount: float) -> list[int]:
    """Count each linear's rows among the `ceil(amount * rows)` lowest of all."""
    ranked = sorted(
        (value, i) for i, scores in enumerate(x for pair in pairs for x in pair) for value in scores
    )
    lowest = [i for _, i in ranked[: math.ceil(len(ranked) * amount)]]
    return [lowest.count(i) for i in range(2 * len(pairs))]


def entering(g: Graph) -> np.ndarray:
    """Return weights of the edges into whole neurons [f d]: the mean over up and gates."""
    return np.mean([np.abs(w) for w in (g.up, *g.gates)], axis=0)


def _backward(s: Settings, graphs: Sequence[Graph], chained: bool) -> list[Pair]:
    d = len(graphs[0].a_in)
    rho, found = np.full(d, 1 / d), []
    for g in reversed(graphs):
        rho = rho if chained else np.full(d, 1 / d)
        f = len(g.a_mid)
        sent = share(
            np.array(
                [g.a_mid[k] * sum(abs(g.down[c, k]) * rho[c] for c in range(d)) for k in range(f)]
            )
        )
        neurons = s.gamma * sent + (1 - s.gamma) * share(g.a_mid)
        found.append((neurons, s.gamma * share(g.a_down * rho) + (1 - s.gamma) * share(g.a_down)))
        m = handed_on(entering(g), s.theta)
        rho = 0.5 * rho + 0.5 * share(
            np.array([sum(m[k, c] * neurons[k] for k in range(f)) for c in range(d)])
        )
    return found[::-1]


def _forward(s: Settings, graphs: Sequence[Graph], chained: bool) -> list[Pair]:
    found, prev = [], share(graphs[0].a_in)
    for g in graphs:
        prev = prev if chained else share(g.a_in)
        into = share((entering(g) @ without_lowest(prev, s.zeroed)) * g.a_mid)
        prev = share((np.abs(g.down) @ without_lowest(into, s.zeroed)) * g.a_down)
        found.append((share(into * np.abs(g.down).sum(axis=0)), prev))
    return found


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


def whole(s: Settings, graphs: Sequence[Graph], chained: bool) -> list[Pair]:
    """Return importance of whole neurons and of the channels they write."""
    if s.name in ("wpr", "mpr"):
        return (_backward if s.name == "wpr" else _forward)(s, graphs, chained)
    return [_alone(s, g) for g in graphs]
