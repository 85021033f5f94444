"""LSA (Yang et al. 2026), maths: the error of a linear whose weights are removed greedily."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Gram


def group_counts(inputs: int, group: int, share: float) -> np.ndarray:
    """Return how many weights of each group of a row are removed, int32 [groups].

    Args:
      inputs: Inputs of the linear.
      group: Consecutive inputs in a group; the last may have fewer.
      share: Share of a group that is removed, 0 <= share < 1.
    """
    widths = np.minimum(group, inputs - np.arange(0, inputs, group))
    return (widths * share).astype(np.int32)


def reconstruction_error(w: jax.Array, stats: Gram, counts: jax.Array, group: int) -> jax.Array:
    """Return the output error of each row without its weights of least error.

    In each group of inputs the weight goes whose removal adds least to the error, one after the
    other. Weights that went before, in earlier groups as well, count: removing i adds
    w_i^2 H_ii + 2 w_i sum_k w_k H_ki over the k that are gone. No other weight changes.

    Source: Yang et al. 2026, section 3.2.

    Args:
      w: Matrix [out in].
      stats: Gram matrix of the inputs; H is its mean over the samples.
      counts: Weights of a row to remove from each group, int32 [groups].
      group: Consecutive inputs in a group; the last may have fewer.

    Returns:
      Sum over the removed weights of what each added, w_S H_SS w_S, float32 [out].
    """
    chex.assert_rank([w, stats.total, counts], [2, 2, 1])
    out, inputs = w.shape
    padding = -inputs % group
    w = jnp.pad(w.astype(jnp.float32), ((0, 0), (0, padding)))
    h = jnp.pad(stats.total / stats.samples, ((0, padding), (0, padding)))
    # What is padded is never chosen.
    real = jnp.arange(inputs + padding) < inputs
    columns = jnp.arange(group)[None, :]

    def remove_from_group(
        carry: tuple[jax.Array, jax.Array], g: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        removed, error = carry
        start = g * group
        own = jax.lax.dynamic_slice(w, (0, start), (out, group))
        cross = jax.lax.dynamic_slice(h, (0, start), (inputs + padding, group))
        within = jax.lax.dynamic_slice(cross, (start, 0), (group, group))
        gone = jnp.matmul(removed, cross, precision="highest")  # zero for the first group
        added = own**2 * jnp.diagonal(within)[None, :] + 2 * own * gone
        added = jnp.where(jax.lax.dynamic_slice(real, (start,), (group,))[None, :], added, jnp.inf)

        def remove_one(
            _: jax.Array, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            added, error = state
            i = jnp.argmin(added, axis=1)[:, None]  # [out 1]
            error = error + jnp.take_along_axis(added, i, axis=1)[:, 0]
            w_i = jnp.take_along_axis(own, i, axis=1)
            added = added + 2 * own * w_i * within[i[:, 0]]
            return jnp.where(columns == i, jnp.inf, added), error

        added, error = jax.lax.fori_loop(0, counts[g], remove_one, (added, error))
        taken = jnp.where(jnp.isinf(added), own, 0)  # padded weights are zero as well
        return (jax.lax.dynamic_update_slice(removed, taken, (0, start)), error), None

    # Zeros made of w, so that they are split over devices as its rows are.
    nothing = (w * 0, jnp.sum(w * 0, axis=1))
    with jax.named_scope("remove_greedily"):
        (_, error), _ = jax.lax.scan(remove_from_group, nothing, jnp.arange(len(counts)))
    return error
