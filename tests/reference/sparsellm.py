"""SparseLLM's corrected alternation in float64 NumPy, tokens as rows.

Source: Bai et al. 2024, eqs. 4 to 10, with the changes in docs/methods/sparsellm.md. Letters
are the paper's: z the output of W1, s that of its gate, p the input of W2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reference import admm, sparsegpt

Activation = Callable[[np.ndarray], np.ndarray]
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_tanh_slope(x: np.ndarray) -> np.ndarray:
    k = math.sqrt(2 / math.pi)
    t = np.tanh(k * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * k * (1 + 3 * 0.044715 * x**2)


def _silu_slope(x: np.ndarray) -> np.ndarray:
    gate = 0.5 * (1 + np.tanh(x / 2))
    return gate + x * gate * (1 - gate)


def _gelu_slope(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + _erf(x / math.sqrt(2))) + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


ACTIVATIONS: Mapping[str, Activation] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * 0.5 * (1 + np.tanh(x / 2)),
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
SLOPES: Mapping[str, Activation] = {
    "silu": _silu_slope,
    "gelu": _gelu_slope,
    "gelu_new": _gelu_tanh_slope,
    "gelu_pytorch_tanh": _gelu_tanh_slope,
}


class Settings(NamedTuple):
    """Settings of the alternation.

    Attributes:
      act: Name of the activation.
      fraction: Fraction of each matrix to remove.
      alpha, beta, gamma: Weights of the objective's terms.
      damp: The solver's damping, as a share of H's mean diagonal.
      ridge: Damping of the fits before SparseGPT, likewise.
      iterations: Iterations, at least 1.
      solver: "sparsegpt" or "admm".
    """

    act: str
    fraction: float
    alpha: float
    beta: float
    gamma: float
    damp: float
    ridge: float
    iterations: int
    solver: str = "sparsegpt"


class Linear(NamedTuple):
    """W [out in] and its bias [out]."""

    w: np.ndarray
    b: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the outputs [n out] of inputs [n in]."""
        return x @ self.w.T + self.b


class Ffn(NamedTuple):
    """The linears W1 and W2, and W1's gate; None without one."""

    w1: Linear
    gate: Linear | None
    w2: Linear


def activated(
    c: Settings, m: np.ndarray, u: np.ndarray, p: np.ndarray, factor: np.ndarray | float
) -> np.ndarray:
    """Return u after one step on alpha (u - m)^2 + gamma (p - factor act(u))^2, entry by entry."""
    act = ACTIVATIONS[c.act]

    def cost(u: np.ndarray) -> np.ndarray:
        return c.alpha * (u - m) ** 2 + c.gamma * (p - factor * act(u)) ** 2

    if c.act == "relu":
        on = (c.alpha * m + c.gamma * factor * p) / (c.alpha + c.gamma * factor**2)
        on, off = np.maximum(on, 0), np.minimum(m, 0)
        return np.where(cost(on) <= cost(off), on, off)
    slope = factor * SLOPES[c.act](u)
    gradient = c.alpha * (u - m) - c.gamma * slope * (p - factor * act(u))
    new = u - gradient / (c.alpha + c.gamma * slope**2)
    return np.where(cost(new) < cost(u), new, u)


def _hidden(c: Settings, ffn: Ffn, x: np.ndarray) -> np.ndarray:
    act, z = ACTIVATIONS[c.act], ffn.w1(x)
    return act(z) if ffn.gate is None else act(ffn.gate(x)) * z


def _targets(c: Settings, ffn: Ffn, x: np.ndarray, y: np.ndarray) -> Sequence[np.ndarray]:
    """Return what W1, and its gate where there is one, should put out."""
    h, w2 = _hidden(c, ffn, x), ffn.w2.w
    # The paper's own system, f x f.
    system = c.beta * w2.T @ w2 + c.gamma * np.eye(w2.shape[1])
    p = np.linalg.solve(system, (c.beta * (y - ffn.w2.b) @ w2 + c.gamma * h).T).T
    m = ffn.w1(x)
    if ffn.gate is None:
        return [activated(c, m, m, p, 1.0)]
    s = ffn.gate(x)
    g = ACTIVATIONS[c.act](s)
    z = (c.alpha * m + c.gamma * g * p) / (c.alpha + c.gamma * g**2)
    return [z, activated(c, s, s, p, z)]


def _fit(
    c: Settings, start: Linear, x: np.ndarray, residual: np.ndarray, h: np.ndarray
) -> np.ndarray:
    """Return W after the fit that starts at W, pruned with H [in in]."""
    if c.solver == "admm":
        wanted = x.T @ (x @ start.w.T + residual)
        return admm.solve(start.w, x.T @ x, c.fraction, target=wanted, damp=c.damp)[0]
    ridge = c.ridge * np.mean(np.diag(h)) * np.eye(len(h))
    w = start.w + (2 / len(x)) * residual.T @ x @ np.linalg.inv(h + ridge)
    return sparsegpt.solve(w, h, c.fraction, damp=c.damp)[0]


def solve(dense: Ffn, x: np.ndarray, y: np.ndarray, c: Settings) -> tuple[list[Ffn], list[float]]:
    """Run the alternation.

    Args:
      dense: The dense part.
      x: Its inputs [n d].
      y: Wanted outputs [n d].
      c: Settings.

    Returns:
      The part after each iteration, and its mean squared error.
    """
    h1 = 2 / len(x) * x.T @ x

    def pruned(p: Linear, h: np.ndarray) -> Linear:
        if c.solver == "admm":
            return p._replace(w=admm.solve(p.w, h, c.fraction, damp=c.damp)[0])
        return p._replace(w=sparsegpt.solve(p.w, h, c.fraction, damp=c.damp)[0])

    hidden = _hidden(c, dense, x)
    gate = None if dense.gate is None else pruned(dense.gate, h1)
    ffn = Ffn(pruned(dense.w1, h1), gate, pruned(dense.w2, 2 / len(x) * hidden.T @ hidden))
    parts = [ffn]
    for _ in range(c.iterations - 1):
        targets = _targets(c, ffn, x, y)
        linears = [ffn.w1] if ffn.gate is None else [ffn.w1, ffn.gate]
        fitted = [
            p._replace(w=_fit(c, p, x, t - p(x), h1)) for p, t in zip(linears, targets, strict=True)
        ]
        ffn = Ffn(fitted[0], fitted[1] if ffn.gate is not None else None, ffn.w2)
        hidden = _hidden(c, ffn, x)
        h2 = 2 / len(x) * hidden.T @ hidden
        w2 = _fit(c, dense.w2, hidden, y - dense.w2(hidden), h2)
        ffn = ffn._replace(w2=dense.w2._replace(w=w2))
        parts.append(ffn)
    losses = [float(np.mean((p.w2(_hidden(c, p, x)) - y) ** 2)) for p in parts]
    return parts, losses
