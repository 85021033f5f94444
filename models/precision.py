"""Types that matrix products are computed in."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from models.errors import InputError
from models.jax_settings import changed, current

AUTO = "auto"
SETTING = "jax_default_matmul_precision"
VARIABLE = SETTING.upper()  # of processes that are started meanwhile
MATMULS = (AUTO, "float32", "bfloat16")


def check_single_precision() -> None:
    """Check that JAX makes 32-bit numbers of Python's, as all computations here expect.

    Raises:
      InputError: JAX's 64-bit mode is on.
    """
    if jax.config.read("jax_enable_x64"):
        raise InputError(
            "JAX's 64-bit mode is on (JAX_ENABLE_X64), and models are computed in 32 bits",
            "unset JAX_ENABLE_X64",
        )


def matmul_setting() -> str | None:
    """Return JAX's type of products in this thread."""
    setting: str | None = current(SETTING)
    return setting


@contextlib.contextmanager
def matmul_type(matmul: str) -> Iterator[None]:
    """Choose how products of float32 matrices are computed, here and in processes started here.

    Args:
      matmul: "float32", "bfloat16" (operands rounded to bfloat16, sums in float32), or "auto", as
        JAX is set: by default float32 on CPUs, faster and coarser on GPUs and TPUs.
    """
    # Not `jax.default_matmul_precision`, which other threads would not see. JAX keys its compiled
    # programs by either.
    with changed({} if matmul == AUTO else {SETTING: matmul}):
        yield


def float32_products() -> contextlib.AbstractContextManager[Any]:
    """Return a context of full float32 products, except where bfloat16 was chosen.

    For sums over tokens, which TPUs' default passes would leave too coarse to invert. Operands that
    `product` rounds are rounded alike on both sides, and their sums are exact.
    """
    if matmul_setting() == "bfloat16":
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def product(spec: str, a: jax.Array, b: jax.Array, **options: Any) -> jax.Array:
    """Multiply as `jnp.einsum` does, in the chosen type.

    XLA's CPU backend ignores JAX's setting, so that the operands are rounded here.

    Args:
      spec: Subscripts.
      a: First operand.
      b: Second operand.
      options: Further arguments of `jnp.einsum`.

    Returns:
      Product, in the type that `jnp.einsum` gives.
    """
    if matmul_setting() != "bfloat16" or not a.dtype == b.dtype == jnp.float32:
        return jnp.einsum(spec, a, b, **options)
    return _rounded_product(spec, a, b)


# JAX's own derivative would multiply the float32 gradient by the rounded operand in float32.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply float32 operands that are rounded to bfloat16, with sums in float32."""
    return _round_and_keep(spec, a, b)[0]


def _round_and_keep(
    spec: str, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the product, and the rounded operands for its derivative."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32), (a, b)


def _rounded_gradients(
    spec: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of both operands, as products of the rounded gradient."""
    (a, b), gradient = operands, gradient.astype(jnp.bfloat16)
    inputs, output = spec.split("->")
    of_a, of_b = inputs.split(",")
    in_float32: Any = {"preferred_element_type": jnp.float32}
    return (
        jnp.einsum(f"{output},{of_b}->{of_a}", gradient, b, **in_float32),
        jnp.einsum(f"{output},{of_a}->{of_b}", gradient, a, **in_float32),
    )


_rounded_product.defvjp(_round_and_keep, _rounded_gradients)
