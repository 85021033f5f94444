"""The seconds and programs of a command's compilation."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from launch.run.compilation import counted


def test_what_is_compiled_inside_is_counted_once() -> None:
    """A function that calls others is traced for as long as they are, not for twice that."""

    @jax.jit
    def inner(x: jax.Array) -> jax.Array:
        time.sleep(0.2)
        return jnp.cos(x) * 3

    @jax.jit
    def outer(x: jax.Array) -> jax.Array:
        return inner(x) + 1

    x = jnp.arange(5.0)
    began = time.time()
    with counted() as found:
        outer(x).block_until_ready()
        once = found.record()
        outer(x).block_until_ready()
    assert found.record() == once and once["programs"] == 1
    assert 0.2 < once["seconds"] <= time.time() - began
    jax.jit(lambda x: x * 7)(x)
    assert found.record() == once, "nothing is counted behind the context"


def test_programs_of_the_cache_are_counted(tmp_path: Path) -> None:
    function, x = (lambda x: jnp.tanh(x) * 5), jnp.arange(3.0)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        cached = []
        for _ in range(2):
            with counted() as found:
                jax.jit(function)(x)
            cached.append((found.programs, found.cached))
            jax.clear_caches()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert cached == [(1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [([(0, 1), (2, 4)], 3), ([(1, 2), (3, 4), (0, 6)], 6), ([(0, 1), (3, 4), (2, 6)], 5)],
)
def test_spans_inside_others_add_nothing(spans: list[tuple[float, float]], seconds: float) -> None:
    with counted() as found:
        for start, end in spans:
            jax.monitoring.record_event_time_span(
                "/jax/core/compile/jaxpr_trace_duration", start, end
            )
        jax.monitoring.record_event_time_span("/jax/another", 0.0, 100.0)
    assert found.seconds == seconds and found.programs == 0
