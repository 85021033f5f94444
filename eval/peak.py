"""Measured peak speed of a device: of matrix products, and of its memory."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from models.precision import matmul_setting

# Size of the square matrices whose product gives the peak, by backend; elsewhere DEFAULT_SIZE.
SIZES = {"cpu": 2048}
DEFAULT_SIZE = 8192
# Bytes of the array that gives the speed of memory: far more than any cache holds.
PASS_BYTES = {"cpu": 1 << 28}
DEFAULT_PASS_BYTES = 1 << 30
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
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / _fastest(lambda: multiply(a, a))


def bytes_per_second() -> float:
    """Measure the speed of the default device's memory, by passes over a large array.

    Returns:
      Bytes read and written per second in the fastest of several runs.
    """
    size = PASS_BYTES.get(jax.default_backend(), DEFAULT_PASS_BYTES)
    x = jnp.ones(size // 4, jnp.float32)
    # In place: on a CPU new memory is slower than the pass itself, as its pages are first cleared.
    negate = jax.jit(jnp.negative, donate_argnums=0)

    def run() -> jax.Array:
        nonlocal x
        x = negate(x)
        return x

    return 2 * size / _fastest(run)


def _fastest(run: Callable[[], jax.Array]) -> float:
    """Return the seconds of the fastest of RUNS runs."""
    seconds = []
    jax.block_until_ready(run())  # the first call compiles
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
