"""Reconstruction of a block by gradient: its losses, and trained leaves in the block.

Letters: b windows, t positions, d hidden size.

Sources: Guo et al. 2024 (EBFT), algorithm 1; arXiv 2510.14444, section 3.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

Loss = Literal["mse", "token", "cosine"]


def errors(loss: Loss, y: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum the errors of outputs, and what they are relative to.

    Args:
      loss: "mse": squared error, relative to the target's squares over all tokens; "token": squared
        error of each token over the sum of itself and the target's squares, of which the mean is
        taken; "cosine": one less the cosine of each token.
      y: Outputs, [b t d].
      target: Outputs of the dense model, [b t d].

    Returns:
      Two float32 (): the loss is their ratio. Both add up over micro-batches.
    """
    y, target = y.astype(jnp.float32), target.astype(jnp.float32)
    size = jnp.sum(target**2, axis=-1)
    if loss == "cosine":
        of_y = jnp.sum(y**2, axis=-1)
        # The epsilon is far below any token's square; it keeps a gradient of zeros finite.
        lengths = jax.lax.rsqrt(size + 1e-20) * jax.lax.rsqrt(of_y + 1e-20)
        return jnp.sum(1 - jnp.sum(y * target, axis=-1) * lengths), jnp.float32(size.size)
    squares = jnp.sum((y - target) ** 2, axis=-1)
    if loss == "token":
        # At most 1: a state that is massive in one of the models alone would be thousands of times
        # as large as its target, and few such tokens would decide over all others.
        return jnp.sum(squares / (size + squares + 1e-20)), jnp.float32(size.size)
    return jnp.sum(squares), jnp.sum(size)


def with_masters(block: Any, trained: Sequence[bool], masters: Sequence[jax.Array]) -> Any:
    """Return the block with the trained leaves in place of its own, in its types.

    Args:
      block: Parameters.
      trained: Whether each leaf is trained, in order.
      masters: The trained leaves in order, float32.
    """
    leaves, structure = jax.tree.flatten(block)
    left = iter(masters)
    new = [next(left).astype(x.dtype) if t else x for x, t in zip(leaves, trained, strict=True)]
    return jax.tree.unflatten(structure, new)
