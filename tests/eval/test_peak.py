"""Peaks of the device are measured."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from eval import peak
from models.precision import matmul_type


def test_peaks_are_of_the_sizes_that_the_backend_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peak.SIZES, "cpu", 256)
    monkeypatch.setitem(peak.PASS_BYTES, "cpu", 1 << 22)
    seconds: list[float] = []
    fastest = peak._fastest

    def noted(run: Callable[[], jax.Array]) -> float:
        seconds.append(fastest(run))
        return seconds[-1]

    monkeypatch.setattr(peak, "_fastest", noted)
    with matmul_type("float32"):
        assert peak.flops_per_second(jnp.dtype("float32")) == 2 * 256**3 / seconds[0]
    # Read and written, once each.
    assert peak.bytes_per_second() == 2 * 4 * 2**20 / seconds[1]
