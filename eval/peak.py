"""Measured peak speed of a device."""

import time

import jax
import jax.numpy as jnp

from models.precision import matmul_setting

# Size of the square matrices whose product gives the peak, by backend; elsewhere DEFAULT_SIZE.
SIZES = {"cpu": 2048}
DEFAULT_SIZE = 8192
RUNS = 10


def flops_per_second(dtype: jnp.dtype) -> float:
    """Measure the speed of a large matrix product on the default device, in the chosen type.

    Args:
      dtype: Type of the matrices.

    Returns:
      Floating-point operations per second of the fastest of several runs.
    """
    size = SIZES.get(jax.default_backend(), DEFAULT_SIZE)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    if matmul_setting() == "bfloat16":
        a = a.astype(jnp.bfloat16)
    multiply, seconds = jax.jit(jnp.matmul), []
    jax.block_until_ready(multiply(a, a))  # the first call compiles
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(multiply(a, a))
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
