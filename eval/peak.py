"""What a device can do at most."""

import time

import jax
import jax.numpy as jnp

SIZES = {"cpu": 2048}  # of the square matrices whose product gives a device's peak; elsewhere LARGE
LARGE, RUNS = 8192, 10


def flops_per_second(dtype: jnp.dtype) -> float:
    """Floating-point operations a second of a large matrix product on the default device, the best of a few."""
    size = SIZES.get(jax.default_backend(), LARGE)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product, seconds = jax.jit(jnp.matmul), []
    jax.block_until_ready(product(a, a))
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
