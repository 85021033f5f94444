"""Repairs of a model that lost blocks, in float64, from whole forwards of both models."""

from collections.abc import Collection
from typing import Any

import numpy as np

from models.arch import Model, embed
from models.layers import Linear
from reference.small import run_block

RIDGE = 0.3


def refit(
    p: Linear, h: np.ndarray, y: np.ndarray, target: np.ndarray, branch_scale: float = 1.0
) -> Linear:
    """Fit a linear with inputs h [n c], so that y [n d], to which it adds, comes near the target.

    The rows of weighted least squares are written out, the ridge as further rows.
    """
    h, y, target = (np.asarray(a, np.float64) for a in (h, y, target))
    root = 1 / np.sqrt((target**2).mean(axis=1))[:, None]
    lacks = target - y
    ones = np.ones((len(h), 0 if p.b is None else 1))
    mean = 0 if p.b is None else (root**2 * h).sum(axis=0) / (root**2).sum()
    ridge = RIDGE * ((root * (h - mean)) ** 2).sum(axis=0).mean()
    rows = root * np.hstack([h, ones])
    held = np.hstack([np.sqrt(ridge) * np.eye(h.shape[1]), np.zeros((h.shape[1], ones.shape[1]))])
    right = np.vstack([root * lacks, np.zeros((h.shape[1], y.shape[1]))])
    change = np.linalg.lstsq(np.vstack([rows, held]), right, rcond=None)[0].T / branch_scale
    w = np.asarray(p.w, np.float64) + change[:, : h.shape[1]]
    b = None if p.b is None else np.asarray(p.b, np.float64) + change[:, -1]
    return Linear(w.astype(np.float32), None if b is None else b.astype(np.float32))


def relative_error(y: np.ndarray, target: np.ndarray) -> float:
    """Return the mean over tokens of |y - target|^2 / |target|^2, both [n d]."""
    return float((((y - target) ** 2).sum(axis=1) / (target**2).sum(axis=1)).mean())


def repair(
    m: Model, removed: Collection[int], tokens: np.ndarray, kind: str
) -> tuple[list[Any], np.ndarray, list[dict[str, Any]]]:
    """Remove blocks, and repair each cut on the streams of whole forwards.

    Returns the blocks that stay, fitted but not rescaled; the logits of the pruned model, whose
    stream is multiplied by each cut's factor; and the figures of the cuts.
    """
    dense = [embed(m.arch, m.non_block, tokens)]
    taps = []
    for block in m.blocks:
        y, tap = run_block(m, block, dense[-1])
        dense.append(y)
        taps.append(tap)
    kept = [i for i in range(len(m.blocks)) if i not in removed]
    linear = [s.name for s in m.arch.slots if s.feeds == "next"][-1]
    x, blocks, cuts = dense[0], [], []

    def flat(a: Any) -> np.ndarray:
        return np.asarray(a, np.float64).reshape(-1, a.shape[-1])

    def scaled(x: Any, end: int, figures: dict[str, Any]) -> Any:
        if "scale" in kind:
            sizes = (np.linalg.norm(flat(a), axis=1) for a in (dense[end], x))
            figures["factor"] = float(np.divide(*sizes).mean())
            x = x * np.float32(figures["factor"])
        cuts.append(figures)
        return x

    if kept[0]:
        x = scaled(x, kept[0], {"behind": None})
    for block, i, end in zip(
        (m.blocks[i] for i in kept), kept, [*kept[1:], len(m.blocks)], strict=True
    ):
        y, tap = run_block(m, block, x)
        figures = {"behind": i, "linear": linear}
        if end > i + 1 and "refit" in kind:
            h, target = flat(tap[m.arch.tap(linear)]), flat(dense[end])
            new = refit(getattr(block, linear), h, flat(y), target, m.arch.branch_scale)
            block = block.replace(**{linear: new})
            before = relative_error(flat(y), target)
            y, _ = run_block(m, block, x)
            figures["error"] = [before, relative_error(flat(y), target)]
        x = scaled(y, end, figures) if end > i + 1 else y
        blocks.append(block)
    return blocks, np.asarray(m.arch.head(m.non_block, x)), cuts
