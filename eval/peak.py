"""Measured peak speed of a device."""

import time

import jax
import jax.numpy as jnp

# Size of the square matrices whose product gives the peak, by backend; elsewhere DEFAULT_SIZE.
SIZES = {"cpu": 2048}
DEFAULT_SIZE = 8192
RUNS = 10


def flops_per_second(dtype: jnp.dtype) -> float:
    """Measure the speed of a large matrix product on the default device.

    Args:
      dtype: Type of the matrices.

    Returns:
      Floating-point operations per second of the fastest of several runs.
    """
    size = SIZES.get(jax.default_backend(), DEFAULT_SIZE)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product, seconds = jax.jit(jnp.matmul), []
    jax.block_until_ready(product(a, a))  # the first call compiles
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
