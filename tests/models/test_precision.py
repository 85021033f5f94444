"""Products in the chosen type, against float64 products of the rounded operands."""

import os
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from calibration.observers import gram
from models.precision import VARIABLE, matmul_setting, matmul_type, product

A, B = (
    np.random.default_rng(k).normal(size=shape).astype(np.float32)
    for k, shape in enumerate([(2, 48, 96), (32, 96)])
)
LINEAR = "bti,oi->bto"


def rounded(x: np.ndarray) -> np.ndarray:
    """Round to bfloat16; float64 to compute with."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def test_bfloat16_rounds_the_operands_and_sums_in_float32() -> None:
    with matmul_type("bfloat16"):
        got = jax.jit(lambda a, b: product(LINEAR, a, b))(A, B)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.einsum(LINEAR, rounded(A), rounded(B)), atol=2e-5)
    assert not np.allclose(got, np.einsum(LINEAR, A, B), atol=2e-3)


@pytest.mark.parametrize("matmul", ["auto", "float32"])
def test_float32_is_what_einsum_computes(matmul: str) -> None:
    with matmul_type(matmul):
        got = product(LINEAR, jnp.asarray(A), jnp.asarray(B))
    np.testing.assert_array_equal(got, jnp.einsum(LINEAR, A, B))


def test_solvers_that_ask_for_the_highest_precision_keep_float32() -> None:
    with matmul_type("bfloat16"), jax.default_matmul_precision("highest"):
        got = product(LINEAR, jnp.asarray(A), jnp.asarray(B))
    np.testing.assert_array_equal(got, jnp.einsum(LINEAR, A, B))


def test_other_threads_and_processes_started_here_use_the_type_until_the_end() -> None:
    before, seen = (matmul_setting(), os.environ.get(VARIABLE)), []
    with matmul_type("bfloat16"):
        thread = threading.Thread(target=lambda: seen.append(matmul_setting()))
        thread.start()
        thread.join()
        assert os.environ[VARIABLE] == "bfloat16"
    assert seen == ["bfloat16"]
    assert (matmul_setting(), os.environ.get(VARIABLE)) == before


@pytest.mark.parametrize("spec", [LINEAR, "...i,oi->...o"])
def test_gradients_under_bfloat16_are_products_of_rounded_operands(spec: str) -> None:
    above = np.random.default_rng(3).normal(size=(2, 48, 32)).astype(np.float32)
    with matmul_type("bfloat16"):
        got = jax.vjp(lambda a, b: product(spec, a, b), jnp.asarray(A), jnp.asarray(B))[1](above)
    want = (
        np.einsum("bto,oi->bti", rounded(above), rounded(B)),
        np.einsum("bto,bti->oi", rounded(above), rounded(A)),
    )
    for new, expected in zip(got, want, strict=True):
        assert new.dtype == jnp.float32
        np.testing.assert_allclose(new, expected, atol=1e-4)


@pytest.mark.parametrize("channels", [96, 1024])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_gram_of_bfloat16_operands_is_exact_but_for_float32_sums(
    channels: int, stored: str
) -> None:
    """Both operands are rounded alike, so that the matrix stays positive semidefinite."""
    x = np.random.default_rng(2).normal(size=(2, 64, channels)).astype(np.float32)
    with matmul_type("bfloat16" if stored == "float32" else "auto"):
        got = gram.update(gram.init(channels), jnp.asarray(x, stored)).total
    flat = rounded(x).reshape(-1, channels)
    np.testing.assert_allclose(got, flat.T @ flat, atol=1e-4)
    assert np.array_equal(got, got.T)
