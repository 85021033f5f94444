"""First and second moments of activations, over windows and over the tokens of an expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from calibration.observers import Observer, SecondMoment, add_experts, second_moment
from models.experts import Routed


class Moments(NamedTuple):
    """First and second moments of each channel.

    Attributes:
      second: Sum of squares.
      sums: Sum over sequences of their sums over tokens [c].
      squares: Sum over sequences of the squares of these sums [c].
      variances: Sum over sequences of the variance within each [c].
      length: Tokens in a sequence, float32 (); all are equal.
    """

    second: SecondMoment
    sums: jax.Array
    squares: jax.Array
    variances: jax.Array
    length: jax.Array

    @property
    def window_sum(self) -> jax.Array:
        """Return the mean over sequences of the sum over tokens [c]."""
        return self.sums / self.second.samples

    @property
    def mean(self) -> jax.Array:
        """Return the mean over all tokens [c]."""
        return self.window_sum / self.length

    @property
    def variance_within(self) -> jax.Array:
        """Return the mean over sequences of the variance within each [c]."""
        return self.variances / self.second.samples

    @property
    def variance(self) -> jax.Array:
        """Return the variance over all tokens [c], within sequences and between them."""
        # In float32 this difference of squares may come out just below zero.
        between = self.squares / self.second.samples - self.window_sum**2
        return self.variance_within + jnp.maximum(between, 0) / self.length**2


def _moments_init(c: int) -> Moments:
    return Moments(second_moment.init(c), jnp.zeros(c), jnp.zeros(c), jnp.zeros(c), jnp.zeros(()))


def _moments_update(state: Moments, x: jax.Array) -> Moments:
    x = x.astype(jnp.float32)
    sums = jnp.sum(x, axis=1)
    return Moments(
        second_moment.update(state.second, x),
        state.sums + jnp.sum(sums, axis=0),
        state.squares + jnp.sum(sums**2, axis=0),
        # About each window's own mean: E[x^2] - E[x]^2 would lose most digits where the mean is
        # large.
        state.variances + jnp.sum(jnp.var(x, axis=1), axis=0),
        jnp.full_like(state.length, x.shape[1]),
    )


class TokenMoments(NamedTuple):
    """First and second moments of each channel over an expert's tokens, with Moments' properties.

    Attributes:
      second: Sum of squares.
      sums: Sum over tokens [c].
      within: Sum over tiles of the squared distances from each tile's mean [c].
      squares: Sum over tiles of tokens times the square of the tile's mean [c].
      tokens: Tokens of the expert, float32 ().
    """

    second: SecondMoment
    sums: jax.Array
    within: jax.Array
    squares: jax.Array
    tokens: jax.Array

    @property
    def length(self) -> jax.Array:
        """Return the mean number of the expert's tokens in a window, float32 ()."""
        return self.tokens / self.second.samples

    @property
    def window_sum(self) -> jax.Array:
        """Return the mean over windows of the sum over tokens [c]."""
        return self.sums / self.second.samples

    @property
    def mean(self) -> jax.Array:
        """Return the mean over all tokens [c], 0 without any."""
        return self.sums / jnp.maximum(self.tokens, 1)

    @property
    def variance_within(self) -> jax.Array:
        """Return the mean squared distance from the means of tiles [c]."""
        return self.within / jnp.maximum(self.tokens, 1)

    @property
    def variance(self) -> jax.Array:
        """Return the variance over all tokens [c]."""
        between = self.squares / jnp.maximum(self.tokens, 1) - self.mean**2
        return self.variance_within + jnp.maximum(between, 0)


def _token_moments_init(c: int) -> TokenMoments:
    return TokenMoments(
        second_moment.init(c), jnp.zeros(c), jnp.zeros(c), jnp.zeros(c), jnp.zeros(())
    )


def _token_moments_update(state: TokenMoments, routed: Routed) -> TokenMoments:
    x, present = routed.x.astype(jnp.float32), routed.present[:, :, None]
    counts = jnp.sum(present, axis=1).astype(jnp.float32)  # tokens of each tile, [tiles 1]
    sums = jnp.sum(x, axis=1)  # rows without a token are zeros
    means = sums / jnp.maximum(counts, 1)
    distances = jnp.where(present, x - means[:, None, :], 0.0)
    return TokenMoments(
        add_experts(state.second, routed),
        state.sums + routed.sum_by_expert(sums),
        state.within + routed.sum_by_expert(jnp.sum(distances**2, axis=1)),
        state.squares + routed.sum_by_expert(counts * means**2),
        state.tokens + routed.tokens.astype(jnp.float32),
    )


moments = Observer(
    _moments_init, _moments_update, Observer(_token_moments_init, _token_moments_update)
)
