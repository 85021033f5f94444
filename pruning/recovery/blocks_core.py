r"""Reconstruction of a block by gradient: losses, AdamW under a mask, rounding to what is stored.

Letters: b windows, t positions, d hidden size.

Sources: Guo et al. 2024 (EBFT), algorithm 1; arXiv 2510.14444, section 3; AdamW is Loshchilov &
Hutter 2019, algorithm 2, as optax has it.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Loss = Literal["mse", "token", "cosine"]
# EBFT's, which forget the gradient's square after twenty steps.
BETAS = (0.9, 0.95)
WARM_UP = 0.1  # share of the steps


class Training(NamedTuple):
    """State of the training of one block.

    Attributes:
      masters: Trained leaves of the block in order, float32.
      adam: Moments of the optimizer, two numbers an entry.
    """

    masters: list[jax.Array]
    adam: Any


def learning_rates(peak: float, steps: int) -> np.ndarray:
    """Return the learning rate of each step: a linear rise, then a linear fall to zero.

    Args:
      peak: Largest learning rate.
      steps: Number of steps.

    Returns:
      Learning rates, float32 [steps].
    """
    rising = max(1, round(WARM_UP * steps))
    schedule = optax.join_schedules(
        [
            # From one step's share, as a first step of zero would be lost.
            optax.linear_schedule(peak / rising, peak, max(1, rising - 1)),
            optax.linear_schedule(peak, 0.0, max(1, steps - rising)),
        ],
        [rising],
    )
    return np.asarray([schedule(step) for step in range(steps)], np.float32)


def errors(loss: Loss, y: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum the errors of outputs, and what they are relative to.

    Args:
      loss: "mse": squared error, relative to the target's squares over all tokens; "token": the
        same of each token, of which the mean is taken; "cosine": one less the cosine of each token.
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
        return jnp.sum(squares / (size + 1e-20)), jnp.float32(size.size)
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


def trained_leaves(tree: Any, trained: Sequence[bool]) -> list[Any]:
    """Return the leaves of a tree that are trained, in order."""
    return [x for x, t in zip(jax.tree.leaves(tree), trained, strict=True) if t]


def _optimizer(decay: Any) -> optax.GradientTransformation:
    """Return AdamW without its learning rate; matrices alone decay."""
    return optax.chain(
        optax.scale_by_adam(*BETAS),
        optax.add_decayed_weights(decay, mask=lambda tree: [x.ndim == 2 for x in tree]),
    )


def begin(block: Any, trained: Sequence[bool]) -> Training:
    """Return the state before the first step.

    Args:
      block: Parameters.
      trained: Whether each leaf is trained, in order.
    """
    masters = [x.astype(jnp.float32) for x in trained_leaves(block, trained)]
    return Training(masters, _optimizer(0.0).init(masters))


def update(
    state: Training,
    gradients: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    rate: jax.Array,
    decay: jax.Array,
) -> Training:
    """Take one step of AdamW in which masked entries stay as they are.

    The mask comes before the optimizer: the moments of a zero then stay zero, and so does its
    decay, which is proportional to its value.

    Args:
      state: Masters and moments.
      gradients: Gradient of each master.
      masks: Entries that may change, bool, of each master.
      rate: Learning rate, float32 ().
      decay: Decoupled weight decay of the matrices, float32 (), times the learning rate.
    """
    masked = [jnp.where(m, g, 0.0) for g, m in zip(gradients, masks, strict=True)]
    # optax divides by powers of a step count, an integer, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, adam = _optimizer(decay).update(masked, state.adam, state.masters)
    masters = [
        x - jnp.where(m, rate * u, 0.0)
        for x, u, m in zip(state.masters, updates, masks, strict=True)
    ]
    return Training(masters, adam)
