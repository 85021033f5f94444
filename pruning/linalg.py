"""Inverse of a positive definite matrix as a product of triangles, made of matrix products.

No library's factorisation: LAPACK's threads wait for each other where a processor has other work,
and for TPUs XLA unrolls Cholesky and triangular solves into steps of 128 columns, each compiled on
its own.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

# Most columns that are factored one by one.
LEAF = 64
# Most columns that are factored by halves: the compiler unrolls every half.
PANEL = 2048


def inverse_factor(h: jax.Array) -> jax.Array:
    """Return the upper triangular U with U^T U = H^-1.

    With H = [A B; B^T C], U = [U_A, -U_A X U_C; 0, U_C], where X = B U_C^T and U_A is the factor of
    A - X X^T. Nearly all of it is matrix products, and H is neither inverted nor factored twice.

    Args:
      h: Symmetric matrix, [c c].

    Returns:
      U [c c]; NaN where H is not positive definite.
    """
    chex.assert_shape(h, (len(h), len(h)))
    with jax.default_matmul_precision("highest"):
        return _by_halves(h) if len(h) <= PANEL else _by_panels(h, -(-len(h) // PANEL), _by_halves)


# A program of its own, so that halves of one size are traced once.
@jax.jit
def _by_halves(h: jax.Array) -> jax.Array:
    """Return U [c c] by recursion on the halves of H; the compiled program grows with H."""
    n = len(h) // 2
    if len(h) <= LEAF:
        return _by_panels(h, len(h), lambda a: 1 / jnp.sqrt(a))
    last = _by_halves(h[n:, n:])
    x = h[:n, n:] @ last.T
    first = _by_halves(h[:n, :n] - x @ x.T)
    return jnp.block([[first, -first @ (x @ last)], [jnp.zeros((len(h) - n, n)), last]])


def _by_panels(h: jax.Array, panels: int, factor: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return U [c c] by one loop over panels of columns, the last first.

    Each step multiplies whole matrices: three times the operations of `_by_halves`, in a program
    whose size does not depend on H.
    """
    size = -(-len(h) // panels)
    pad = panels * size - len(h)
    a = h
    if pad:
        # Padded with the identity, which factors into itself.
        ones = jnp.pad(jnp.zeros(len(h)), (0, pad), constant_values=1.0)
        a = jnp.pad(h, (0, pad)) + jnp.diag(ones)
    index = jnp.arange(len(a))

    def panel(j: jax.Array, a: jax.Array) -> jax.Array:
        # Rows and columns before `start` hold what is left of H, the other columns of these rows
        # hold X, and the other rows hold U.
        start = len(a) - (j + 1) * size
        column = jax.lax.dynamic_slice_in_dim(a, start, size, 1)
        u = factor(jax.lax.dynamic_slice_in_dim(column, start, size, 0))
        x = jnp.where(index[:, None] < start, column @ u.T, 0.0)
        a = jax.lax.dynamic_update_slice_in_dim(a - x @ x.T, x, start, 1)
        later = jnp.where(
            index[None, :] >= start + size, jax.lax.dynamic_slice_in_dim(a, start, size, 0), 0.0
        )
        row = jax.lax.dynamic_update_slice_in_dim(-u @ (later @ a), u, start, 1)
        return jax.lax.dynamic_update_slice_in_dim(a, row, start, 0)

    return jax.lax.fori_loop(0, panels, panel, a)[: len(h), : len(h)]


def solve(h: jax.Array, b: jax.Array) -> jax.Array:
    """Return H^-1 b.

    Args:
      h: Symmetric matrix, [c c].
      b: Right sides, [c k].

    Returns:
      The solution, [c k]; NaN where H is not positive definite.
    """
    chex.assert_shape(b, (len(h), None))
    with jax.default_matmul_precision("highest"):
        u = inverse_factor(h)
        return u.T @ (u @ b)
