"""Allocations and DSnoT in float64 NumPy, entry by entry, as the authors' code."""

from collections.abc import Sequence

import numpy as np

from models.arch import Model, embed
from reference import wanda
from reference.small import removed_by_wanda, run_block, weight, without


def spread(values: Sequence[float], sparsity: float, lam: float) -> np.ndarray:
    """Return sparsities of mean `sparsity`, 2 lam apart, the largest value least sparse."""
    x = np.asarray(values, np.float64)
    density = (x - x.min()) / (x.max() - x.min()) * 2 * lam
    return 1 - (density - density.mean() + 1 - sparsity)


def outliers(m: Model, tokens: np.ndarray, threshold: float) -> list[float]:
    """Return OWL's share of outliers of each block of the dense model."""
    x, found = embed(m.arch, m.non_block, tokens), []
    for block in m.blocks:
        x, taps = run_block(m, block, x)
        scores = [
            wanda.score(weight(block, s.name), wanda.scaler_row(taps[s.reads])).ravel()
            for s in m.arch.slots
        ]
        metric = np.concatenate(scores)
        found.append(float(np.mean(metric > threshold * metric.mean())))
    return found


def exponent(w: np.ndarray, released: bool) -> float:
    """Fit AlphaPruning's exponent of one matrix by a loop over the start of the tail."""
    e = np.sort(np.linalg.svd(w, compute_uv=False) ** 2)
    counts, edges = np.histogram(np.log10(e), 100)
    peak = 10 ** edges[np.argmax(counts)]
    low = np.log10(0.95 * peak) if released else 0.95 * peak
    best, found = 1.0, 0.0
    for i in range(len(e) - 1):
        if not low <= e[i] <= 1.5 * peak:
            continue
        tail = e[i:]
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        cumulative = 1 - (tail / tail[0]) ** (1 - alpha)
        distance = np.abs(cumulative - np.arange(len(tail)) / len(tail)).max()
        if alpha > 1 and distance < best:
            best, found = distance, alpha
    return float(found)


def medians(m: Model, tokens: np.ndarray) -> list[float]:
    """Return DLP's lower median of all scores of each block of the dense model."""
    x, found = embed(m.arch, m.non_block, tokens), []
    for block in m.blocks:
        x, taps = run_block(m, block, x)
        scores: list[float] = []
        for s in m.arch.slots:
            scores += list(
                wanda.score(weight(block, s.name), wanda.scaler_row(taps[s.reads])).ravel()
            )
        found.append(sorted(scores)[(len(scores) - 1) // 2])
    return found


def greedy_error(w: np.ndarray, h: np.ndarray, group: int, share: float) -> float:
    """Return LSA's error of one matrix [out in]: one row, one group, one weight after the other.

    The error is that of the outputs of what is removed so far, so its growth is that of a step.
    """
    total = 0.0
    for row in w.astype(np.float64):
        gone: list[int] = []
        for start in range(0, len(row), group):
            own = list(range(start, min(start + group, len(row))))
            for _ in range(int(len(own) * share)):
                left = [i for i in own if i not in gone]

                def error(removed: list[int], row: np.ndarray = row) -> float:
                    part = row[removed]
                    return float(part @ h[np.ix_(removed, removed)] @ part)

                gone.append(min(left, key=lambda i: error([*gone, i])))
        total += error(gone)
    return total


def share_of_sum(values: Sequence[float]) -> np.ndarray:
    """Return 1 less the share of the sum, DLP's and LSA's importance."""
    return np.array([1 - v / sum(values) for v in values])


def progression(blocks: int, sparsity: float, beta: float) -> list[float]:
    """Return ATP's sparsities, eq. 10."""
    return [sparsity - beta * (blocks - 1) / 2 + beta * (i - 1) for i in range(1, blocks + 1)]


def misalignment(m: Model, tokens: np.ndarray, sparsities: Sequence[float]) -> float:
    """Return NeuroAL's score of block sparsities, with Wanda's masks.

    Each block runs dense and masked on the outputs of the masked blocks before it.
    """
    x, total = embed(m.arch, m.non_block, tokens), 0.0
    for block, sparsity in zip(m.blocks, sparsities, strict=True):
        _, dense = run_block(m, block, x)
        removed = removed_by_wanda(m, block, dense, {s.name: sparsity for s in m.arch.slots})
        x, sparse = run_block(m, without(block, removed), x)
        for s in m.arch.slots:
            a, b = (np.sqrt(wanda.scaler_row(taps[s.reads])) for taps in (dense, sparse))
            total += float(np.linalg.norm(a / a.sum() - b / b.sum())) / len(a)
    return total


def swaps(
    c: np.ndarray,
    metric: np.ndarray,
    variance: np.ndarray,
    kept: np.ndarray,
    cycles: int,
    released: bool,
) -> np.ndarray:
    """Return DSnoT's mask of one row, with swaps taken from the ends of two sorted lists."""
    e = c[~kept].sum()
    removed, now = np.flatnonzero(~kept), kept.copy()
    growing = list(removed[np.argsort(c[removed] / variance[removed])])
    order = np.flatnonzero(kept)[np.argsort(metric[kept])]
    going = [i for i in order if c[i] < 0] + [i for i in order[::-1] if c[i] > 0]
    for _ in range(cycles):
        if not growing or not going:
            break
        g, p = (growing[-1], going[0]) if e > 0 else (growing[0], going[-1])
        after = e + c[p] - c[g]
        wrong = c[g] * e <= 0 or (c[p] * e >= 0 and not released)
        if wrong or (abs(e) <= 0.1 if released else abs(after) >= abs(e)):
            break
        now[g], now[p], e = True, False, after
        growing.remove(g)
        going.remove(p)
    return now
