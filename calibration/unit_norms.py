"""Activation of units of channels, as Minitron has it: the mean over tokens, the norm of windows.

Source: Muralidharan et al. 2024 (arXiv 2407.14679), section 2.2.
"""

import functools

import jax
import jax.numpy as jnp

from calibration.observers import Observer, SecondMoment, second_moment, second_moment_init
from models.experts import Routed


def _norms(x: jax.Array, width: int) -> jax.Array:
    """Return the norm of each unit of x [... units * width], float32 [... units]."""
    x = x.astype(jnp.float32)
    if width == 1:
        return jnp.abs(x)
    return jnp.linalg.norm(x.reshape(*x.shape[:-1], -1, width), axis=-1)


@functools.cache
def unit_norms(width: int) -> Observer:
    """Return the observer whose `SecondMoment.total` has the squared score of every unit.

    A score is the root of the sum over windows of the squared mean over tokens of a unit's norm.
    Of experts' tokens the mean counts the others as zeros, up to a factor that all experts share.

    Args:
      width: Channels of a unit.
    """

    def init(channels: int) -> SecondMoment:
        return second_moment_init(channels // width)

    def update(state: SecondMoment, x: jax.Array) -> SecondMoment:
        means = jnp.mean(_norms(x, width), axis=1)
        # Each window's mean as its only token: the sum of squares does not depend on the batch.
        return second_moment.update(state, means[:, None, :])

    def update_experts(state: SecondMoment, routed: Routed) -> SecondMoment:
        experts, windows = len(routed.tokens), routed.windows
        norms = _norms(routed.x, width)  # rows without a token are zeros
        # Rows without a token have the window `windows`: they go to a segment of their own.
        segment = routed.expert[:, None] * (windows + 1) + routed.window
        flat = norms.reshape(-1, norms.shape[-1])
        sums = jax.ops.segment_sum(flat, segment.reshape(-1), experts * (windows + 1))
        sums = sums.reshape(experts, windows + 1, -1)[:, :windows]
        means = sums * (windows / jnp.sum(routed.tokens).astype(jnp.float32))
        return jax.vmap(second_moment.update)(state, means[:, :, None, :])

    return Observer(init, update, Observer(init, update_experts))
