"""FlattenGPT's merge and cut in float64, from whole forwards of both models."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.arch import Model, embed
from models.layers import Linear
from models.surgery import cut
from reference import depth
from reference.small import run_block


def _flat(a: Any) -> np.ndarray:
    return np.asarray(a, np.float64).reshape(-1, a.shape[-1])


def _w(p: Linear) -> np.ndarray:
    return np.asarray(p.w, np.float64)


def merge(first: Any, second: Any, offset: float = 0.0) -> Any:
    """Stack the rows of what reads the stream, each with its norm's gain; join the columns."""
    new = {}
    for norm, names in {"attn_norm": ("q", "k", "v"), "mlp_norm": ("gate", "up")}.items():
        gains = [np.asarray(getattr(b, norm).scale, np.float64) + offset for b in (first, second)]
        new[norm] = first.attn_norm.replace(scale=np.float32(np.full_like(gains[0], 1 - offset)))
        for name in names:
            parts = [_w(getattr(b, name)) * g for b, g in zip((first, second), gains, strict=True)]
            new[name] = Linear(np.float32(np.vstack(parts)))
    for name in ("o", "down"):
        new[name] = Linear(np.float32(np.hstack([_w(getattr(b, name)) for b in (first, second)])))
    return first.replace(**new)


def weighted_gram(h: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return sum of h h^T / mean square of the target, for h [n c] and target [n d]."""
    return (h / (target**2).mean(axis=1)[:, None]).T @ h


def head_scores(h: np.ndarray, target: np.ndarray, o: Linear, width: int) -> np.ndarray:
    """Return the weighted mean square of what each group of heads sends, through columns of o."""
    power = np.diag(weighted_gram(h, target)) / (1 / (target**2).mean(axis=1)).sum()
    return (power * (_w(o) ** 2).sum(axis=0)).reshape(-1, width).sum(axis=1)


def leverage(gram: np.ndarray) -> np.ndarray:
    """Return the diagonal of C (C + ridge)^-1, the ridge ten times the mean singular value."""
    ridge = 10 * np.linalg.svd(gram, compute_uv=False).mean()
    return np.diag(gram @ np.linalg.inv(gram + ridge * np.eye(len(gram))))


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the keep mask of the highest scores."""
    return np.isin(np.arange(len(scores)), np.argsort(-scores, kind="stable")[:count])


def flatten(
    m: Model, start: int, merged: Sequence[int], tokens: np.ndarray
) -> tuple[Any, list[float]]:
    """Merge blocks into the one before them; return it, and the last error before and after."""
    dense = [embed(m.arch, m.non_block, tokens)]
    taps = []
    for block in m.blocks:
        y, tap = run_block(m, block, dense[-1])
        dense.append(y)
        taps.append(tap)
    scale, x, block = m.arch.branch_scale, dense[start], m.blocks[start]
    offset = float(m.arch.config.static.norm == "rms_offset")
    heads, neurons = m.arch.group("heads"), m.arch.group("neurons")
    errors: list[float] = []
    for i in merged:
        wide = merge(block, m.blocks[i], offset)
        wanted = _flat(x) + scale * _flat(run_block(m, block, x)[1]["o"] + taps[i]["o"])
        h = _flat(run_block(m, wide, x)[1]["attn_mid"])
        keep = best(
            head_scores(h, wanted, wide.o, heads.reader.width),
            block.o.w.shape[1] // heads.reader.width,
        )
        narrow = cut(wide, heads, keep)
        _, tap = run_block(m, narrow, x)
        given = _flat(x) + scale * _flat(tap["o"])
        narrow = narrow.replace(
            o=depth.refit(narrow.o, _flat(tap["attn_mid"]), given, wanted, scale)
        )
        target = _flat(dense[i + 1])
        h = _flat(run_block(m, narrow, x)[1]["mlp_mid"])
        keep = best(leverage(weighted_gram(h, target)), block.down.w.shape[1])
        narrow = cut(narrow, neurons, keep)
        y, tap = run_block(m, narrow, x)
        errors = [depth.relative_error(_flat(y), target)]
        down = depth.refit(narrow.down, _flat(tap["mlp_mid"]), _flat(y), target, scale)
        block = narrow.replace(down=down)
        errors.append(depth.relative_error(_flat(run_block(m, block, x)[0]), target))
    return block, errors
