"""Types that matrix products are computed in."""

import contextlib
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
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
