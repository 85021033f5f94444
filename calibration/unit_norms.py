"""Activation of units, by window: means over tokens as in Minitron, norms over them as in 2SSP.

Source: Muralidharan et al. 2024 (arXiv 2407.14679), section 2.2; Sandri et al. 2025
(arXiv 2501.17771), section 3.
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
        sums = _sum_by_window(_norms(routed.x, width), routed)
        means = sums * (routed.windows / jnp.sum(routed.tokens).astype(jnp.float32))
        return jax.vmap(second_moment.update)(state, means[:, :, None, :])

    return Observer(init, update, Observer(init, update_experts))


def _sum_by_window(values: jax.Array, routed: Routed) -> jax.Array:
    """Sum values [tiles r c] of each expert's tokens by window, [e b c]."""
    experts, windows = len(routed.tokens), routed.windows
    # Rows without a token have the window `windows`: they go to a segment of their own.
    segment = routed.expert[:, None] * (windows + 1) + routed.window
    flat = values.reshape(-1, values.shape[-1])
    sums = jax.ops.segment_sum(flat, segment.reshape(-1), experts * (windows + 1))
    return sums.reshape(experts, windows + 1, -1)[:, :windows]


def _add_norms(state: SecondMoment, squares: jax.Array) -> SecondMoment:
    """Add the roots of sums of squares [b c] of windows."""
    # The square of the fourth root: the sum does not depend on how windows are batched.
    return second_moment.update(state, jnp.sqrt(jnp.sqrt(squares))[:, None, :])


def _window_update(state: SecondMoment, x: jax.Array) -> SecondMoment:
    return _add_norms(state, jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1))


def _window_update_experts(state: SecondMoment, routed: Routed) -> SecondMoment:
    squares = _sum_by_window(jnp.square(routed.x.astype(jnp.float32)), routed)
    return jax.vmap(_add_norms)(state, squares)


# `per_sample` is the mean over windows of each channel's L2 norm over tokens.
window_norms = Observer(
    second_moment_init,
    _window_update,
    Observer(second_moment_init, _window_update_experts),
)
