"""Matrices stored without their zeros come back to the bit."""

import ml_dtypes
import numpy as np
import pytest

from models.checkpoint.pack_formats import PACKINGS

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def random_matrix(rows: int, columns: int, density: float, dtype: type) -> np.ndarray:
    rng = np.random.default_rng(rows + columns)
    x = rng.standard_normal((rows, columns))
    return np.where(rng.random((rows, columns)) < density, x, 0.0).astype(dtype)


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (5, 33), (4, 200)])
@pytest.mark.parametrize("name", PACKINGS)
def test_unpacking_gives_the_same_bits(
    name: str, shape: tuple[int, int], density: float, dtype: type
) -> None:
    matrix = random_matrix(*shape, density, dtype)
    packing = PACKINGS[name]
    read = packing.unpack(packing.pack(matrix), *shape)
    assert read.dtype == matrix.dtype
    np.testing.assert_array_equal(bits(read), bits(matrix))


@pytest.mark.parametrize("name", PACKINGS)
def test_negative_zeros_and_odd_values_keep_their_bits(name: str) -> None:
    matrix = np.zeros((2, 40), np.float32)
    matrix[0, [3, 20]], matrix[1, [0, 39]] = [-0.0, np.nan], [1e-45, -np.inf]
    packing = PACKINGS[name]
    read = packing.unpack(packing.pack(matrix), 2, 40)
    np.testing.assert_array_equal(bits(read), bits(matrix))


def test_macko_is_the_format_of_its_authors() -> None:
    """The matrix, and what their compressor makes of it, are those of their own test.

    Source: test_comressor_fp16_manual in tests/test_macko_spmv.py of
    https://github.com/vlejd/macko_spmv.
    """
    rows = [
        {0: 0.5498, 1: 0.7124, 8: 0.7998, 12: 0.1611, 29: 0.4663},
        {0: 0.2241, 1: 0.6528, 14: 0.4761, 19: 0.4673},
        {21: 0.0166},
        {5: 0.1958},
        {4: 0.5195, 5: 0.5762, 7: 0.8965, 13: 0.5625, 23: 0.2041, 26: 0.8770, 28: 0.1123,
         29: 0.4966, 31: 0.5132},
    ]  # fmt: skip
    matrix = np.zeros((5, 32), np.float16)
    for i, row in enumerate(rows):
        matrix[i, list(row)] = list(row.values())
    values, deltas, row_indices = PACKINGS["macko"].pack(matrix)
    expected = [
        *[0.5498, 0.7124, 0.7998, 0.1611, 0.0, 0.4663, 0.2241, 0.6528, 0.4761, 0.4673, 0.0, 0.0166],
        *[0.1958, 0.0, 0.5195, 0.5762, 0.8965, 0.5625, 0.2041, 0.8770, 0.1123, 0.4966, 0.5132, 0.0],
    ]
    np.testing.assert_array_equal(values, np.array(expected, np.float16))
    np.testing.assert_array_equal(deltas, [0, 54, 15, 0, 76, 95, 245, 4, 81, 41, 1, 1])
    np.testing.assert_array_equal(row_indices, [0, 6, 10, 12, 14, 23])
    assert (deltas.dtype, row_indices.dtype) == (np.uint8, np.int32)


def macko_one_by_one(matrix: np.ndarray) -> tuple[list[float], list[int], list[int]]:
    """MACKO's compression as its paper tells it, entry by entry, before the final padding."""
    values, gaps, ends = [], [], [0]
    for row in matrix:
        gap = 0
        for entry in row:
            if entry != 0 or gap == 15:
                values.append(float(entry))
                gaps.append(gap)
                gap = 0
            else:
                gap += 1
        ends.append(len(values))
    return values, gaps, ends


@pytest.mark.parametrize("density", [0.0, 0.03, 0.1, 0.5, 1.0])
def test_macko_equals_an_entry_by_entry_compression(density: float) -> None:
    matrix = random_matrix(7, 121, density, np.float16)
    wanted, gaps, ends = macko_one_by_one(matrix)
    values, deltas, row_indices = PACKINGS["macko"].pack(matrix)
    assert len(values) % 8 == 0 and len(deltas) == len(values) // 2
    np.testing.assert_array_equal(values[: len(wanted)], wanted)
    assert not values[len(wanted) :].any()
    nibbles = np.stack([deltas & 15, deltas >> 4], 1).reshape(-1)
    np.testing.assert_array_equal(nibbles[: len(gaps)], gaps)
    np.testing.assert_array_equal(row_indices, ends)


def test_half_of_bfloat16_takes_a_bit_an_entry_and_its_values() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 512)).astype(ml_dtypes.bfloat16)
    matrix[:, rng.permutation(512)[:256]] = 0
    size = sum(x.nbytes for x in PACKINGS["bitmask"].pack(matrix))
    assert size / matrix.nbytes == 0.5625


@pytest.mark.parametrize("name", PACKINGS)
def test_tensors_that_contradict_each_other_are_refused(name: str) -> None:
    """Another number of values, rows or columns; no read or write out of bounds."""
    packing = PACKINGS[name]
    good = packing.pack(random_matrix(6, 50, 0.5, np.float32))
    broken = [(good, (6, 70)), (good, (6, 30)), (good, (7, 50)), (good, (6, 10**9))]
    for k, x in enumerate(good):
        for changed in (x[:-1], x[..., :-1], np.concatenate([x, x]), x[:0], -x.astype(np.int64)):
            broken.append(((*good[:k], changed, *good[k + 1 :]), (6, 50)))
    for stored, shape in broken:
        if all(a is b for a, b in zip(stored, good, strict=True)) and shape == (6, 50):
            continue
        try:
            read = packing.unpack(stored, *shape)
        except ValueError:
            continue
        # What passes has the asked shape; values that were changed in place cannot be told.
        assert read.shape == shape
