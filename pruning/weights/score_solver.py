"""Solver of weights by a score: the lowest are zeroed, the others stay as they are."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pruning.types import Mask


@functools.cache  # static arguments of jit must be equal objects
def score_solver(
    score: Callable[[jax.Array, Any], jax.Array], keep: Callable[[jax.Array, jax.Array], Mask]
) -> Callable:
    """Return the solver that zeroes the entries that `keep` drops by their score.

    Args:
      score: (W [out in], statistics) -> score [out in].
      keep: `Pattern.keep`.
    """

    def solve(
        ws: Sequence[jax.Array], stats: Any, counts: Sequence[jax.Array]
    ) -> list[tuple[jax.Array, Mask]]:
        pruned = []
        for w, count in zip(ws, counts, strict=True):
            with jax.named_scope("score"):
                scored = score(w, stats)
            with jax.named_scope("select"):
                kept = keep(scored, count)
            pruned.append((jnp.where(kept, w, jnp.zeros_like(w)), kept))
        return pruned

    return solve
