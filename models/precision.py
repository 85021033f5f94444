"""Refuse a setting of JAX that computes in other types than the models."""

import jax

from models.errors import InputError


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
