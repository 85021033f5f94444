"""AlphaPruning (Lu et al. 2024): blocks whose weights have heavier-tailed spectra are better trained, and keep more."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Block, Model
from models.errors import InputError
from pruning.budget import all_shapes, block_means, by_block, exact
from pruning.types import Allocation, Allocator, Layerwise, Request
from pruning.walk import fold

BINS = 100  # of the histogram whose peak bounds where the tail may begin


@jax.jit
def eigenvalues(w: jax.Array) -> jax.Array:
    """The squared singular values of W [out in], ascending, float32 [min(out, in)]."""
    return jnp.linalg.svd(w.astype(jnp.float32), compute_uv=False)[::-1] ** 2


@jax.jit
def tail_exponents(e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hill's estimate of the power law that the n - i largest eigenvalues follow, and how far off it is, for every i.

    Args:
      e: eigenvalues, ascending and positive, [n].
    Returns (alpha [n], distance [n]): alpha_i = 1 + (n - i) / sum_j>=i log(e_j / e_i), and the Kolmogorov-Smirnov distance between the
    power law and the tail (Clauset et al. 2009).
    """
    n, log = len(e), jnp.log(e)

    def one(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        tail, size = jnp.arange(n) >= i, (n - i).astype(jnp.float32)
        alpha = 1 + size / jnp.sum(jnp.where(tail, log - log[i], 0))
        below = (jnp.arange(n) - i) / size
        distance = jnp.abs(1 - jnp.exp((log - log[i]) * (1 - alpha)) - below)
        return alpha, jnp.max(jnp.where(tail, distance, 0))

    return jax.lax.map(one, jnp.arange(n), batch_size=64)


def _limits(e: np.ndarray, official: bool) -> tuple[float, float]:
    """Where a tail may begin: about the peak of the spectrum on a log scale. The released code takes the logarithm of the lower limit,
    which then mostly is none."""
    logs = np.log10(e)
    counts, edges = np.histogram(logs, BINS, (logs.min(), logs.max()))
    peak = 10 ** float(edges[np.argmax(counts)])
    return (np.log10(0.95 * peak) if official else 0.95 * peak), 1.5 * peak


def exponent(w: jax.Array, official: bool = False) -> float:
    """The power-law exponent alpha of the spectrum of W [out in], where the power law fits best; small is heavy-tailed."""
    e = np.asarray(eigenvalues(w))
    e = e[e > 0]
    if len(e) < 2 or e[0] == e[-1]:
        return 0.0  # no spectrum to speak of
    alpha, distance = (np.asarray(x) for x in tail_exponents(jnp.asarray(e)))
    least, most = _limits(e, official)
    begins = (e >= least) & (e <= most) & (alpha > 1) & (np.arange(len(e)) < len(e) - 1)
    return float(alpha[np.argmin(np.where(begins, distance, 1.0))])


def fractions(exponents: np.ndarray, sparsity: float, epsilon: float) -> np.ndarray:
    """What each block loses [blocks]: linear in its exponent, the most (1 + epsilon) / (1 - epsilon) times the least."""
    span = np.ptp(exponents)
    if span == 0:
        return np.full(len(exponents), sparsity)
    factor = 1 - epsilon + (exponents - exponents.min()) / span * 2 * epsilon
    return sparsity * factor


def alpha(
    epsilon: float = 0.1, variant: Literal["corrected", "official"] = "corrected"
) -> Allocator:
    """AlphaPruning (Lu et al. 2024): the block whose weights have the heaviest-tailed spectra loses least. No calibration data.

    Args:
      epsilon: the most that a block loses is (1 + epsilon) / (1 - epsilon) times the least.
      variant: "official" takes the released code's lower limit of where a tail begins (which mostly is none) and may ask for more than
        all of a block; "corrected", the default, takes the limit that was meant and meets the sparsity to one unit.
    """
    if not 0 <= epsilon < 1:
        raise InputError(f"alpha: epsilon={epsilon} must be at least 0 and less than 1")

    def allocate(
        model: Model, tokens: np.ndarray, request: Request, layerwise: Layerwise
    ) -> Allocation:
        shapes = all_shapes(model)

        def visit(i: int, block: Block, stats: Any) -> tuple[Block, Any]:
            return block, {
                s.name: exponent(getattr(block, s.name).w, variant == "official")
                for s in model.arch.slots
            }

        alone = dataclasses.replace(request, mesh=None)  # a spectrum is of the whole matrix
        key = ("spectra", variant)
        found = fold(
            model,
            tokens,
            alone,
            visit,
            watch={},
            propagate="pruned",
            what="fitting spectra",
            key=key,
        )
        asked = fractions(
            np.array([np.mean(list(block.values())) for block in found]), request.sparsity, epsilon
        )
        sizes = np.array([sum(out * inputs for out, inputs in block.values()) for block in shapes])
        asked = asked * request.sparsity / np.average(asked, weights=sizes)
        if variant == "official":
            budget = by_block(model, np.minimum(asked, 1.0))
        else:
            budget = exact(by_block(model, asked), shapes, request.sparsity)
        return Allocation(budget, {"alpha": found, "block_sparsity": block_means(budget, shapes)})

    return allocate
