"""AdamW under a mask: float32 masters, and moments of zeros that stay zero.

Source: Loshchilov & Hutter 2019, algorithm 2, as optax has it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Those of EBFT (Guo et al. 2024), which forget the gradient's square after twenty steps.
BETAS = (0.9, 0.95)
WARM_UP = 0.1  # share of the steps


class Training(NamedTuple):
    """State of a training.

    Attributes:
      masters: Trained leaves in order, float32.
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


def trained_leaves(tree: Any, trained: Sequence[bool]) -> list[Any]:
    """Return the leaves of a tree that are trained, in order."""
    return [x for x, t in zip(jax.tree.leaves(tree), trained, strict=True) if t]


def _optimizer(decay: Any) -> optax.GradientTransformation:
    """Return AdamW without its learning rate; matrices alone decay."""
    return optax.chain(
        optax.scale_by_adam(*BETAS),
        optax.add_decayed_weights(decay, mask=lambda tree: [x.ndim == 2 for x in tree]),
    )


def begin(params: Any, trained: Sequence[bool]) -> Training:
    """Return the state before the first step.

    Args:
      params: Parameters.
      trained: Whether each leaf is trained, in order.
    """
    masters = [x.astype(jnp.float32) for x in trained_leaves(params, trained)]
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
