"""Scores, patterns and centralities under jit, pmap and shard_map equal those of one device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from calibration.observers import SecondMoment, second_moment
from calibration.runtime import Runtime
from models.sharding import make_mesh
from pruning.methods import METHODS
from pruning.structured import llmrank_core as core
from pruning.structured.page_rank_core import SCORERS
from pruning.types import Request, prune
from pruning.weights import patterns, scores
from reference.small import model, tokens, zeros

DEVICES, OUT, IN = 8, 24, 16
RNG = np.random.default_rng(0)
W = RNG.normal(size=(OUT, IN)).astype(np.float32)
STATS = SecondMoment(RNG.random(IN, np.float32) + 0.1, np.float32(4), np.zeros(IN, np.float32))
TIED = RNG.integers(0, 5, (OUT, IN)).astype(np.float32)


def under_jit(f: Callable[..., Any], *args: Any) -> Any:
    """One device does all eight parts."""
    return jax.jit(jax.vmap(f))(*args)


def under_pmap(f: Callable[..., Any], *args: Any) -> Any:
    """A part a device, in pmap's way."""
    return jax.pmap(f)(*args)


def under_shard_map(f: Callable[..., Any], *args: Any) -> Any:
    """A part a device, in shard_map's way."""

    def part(*shards: Any) -> Any:
        return jax.tree.map(lambda y: y[None], f(*jax.tree.map(lambda x: x[0], shards)))

    spec = PartitionSpec("data")
    return jax.jit(jax.shard_map(part, mesh=make_mesh("data=8"), in_specs=spec, out_specs=spec))(
        *args
    )


WAYS = {"jit": under_jit, "pmap": under_pmap, "shard_map": under_shard_map}
every_way = pytest.mark.parametrize("way", WAYS)


def parts(x: np.ndarray) -> np.ndarray:
    """Rows shared out: [out ...] -> [devices out/devices ...]."""
    return x.reshape(DEVICES, -1, *x.shape[1:])


def everywhere(tree: Any) -> Any:
    """The same on every device, with a leading axis of devices."""
    return jax.tree.map(lambda x: np.broadcast_to(x, (DEVICES, *np.shape(x))), tree)


def assert_same(got: Any, want: Any) -> None:
    """Equal to float32's rounding, which depends on how a sum is compiled."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@every_way
@pytest.mark.parametrize("score", [scores.magnitude, scores.wanda])
def test_weight_scores_of_rows_are_the_same_on_eight_devices(
    score: Callable[..., Any], way: str
) -> None:
    """Every device has some rows of the matrix, and all statistics of its inputs."""
    got = WAYS[way](score, parts(W), everywhere(STATS))
    assert len(jax.tree.leaves(got)[0].sharding.device_set) == (1 if way == "jit" else DEVICES)
    assert_same(got.reshape(OUT, IN), score(W, STATS))


@every_way
@pytest.mark.parametrize(
    ("pattern", "fraction"),
    [
        (patterns.per_row, np.float64(0.4)),
        (patterns.per_row, np.linspace(0, 0.9, OUT)),
        (patterns.n_of_m(2, 4), np.float64(0)),
    ],
    ids=["per_row", "per_row of rows", "2:4"],
)
def test_patterns_of_rows_are_the_same_on_eight_devices(
    pattern: patterns.Pattern, fraction: np.ndarray, way: str
) -> None:
    """Ties included: a row's mask does not depend on the rows beside it."""
    count = pattern.counts(W.shape, fraction)
    want = jax.jit(pattern.keep)(TIED, count)
    got = WAYS[way](pattern.keep, parts(TIED), parts(count) if count.ndim else everywhere(count))
    assert np.array_equal(got.reshape(OUT, IN), want)


@every_way
def test_a_pattern_of_whole_matrices_is_the_same_on_eight_devices(way: str) -> None:
    """A threshold needs its whole matrix, so every device has one of its own."""
    many = RNG.normal(size=(DEVICES, OUT, IN)).astype(np.float32)
    count = patterns.per_matrix.counts((OUT, IN), np.float64(0.4))
    got = WAYS[way](patterns.per_matrix.keep, many, everywhere(count))
    want = [jax.jit(patterns.per_matrix.keep)(matrix, count) for matrix in many]
    assert np.array_equal(got, np.stack(want))


@every_way
def test_observers_sum_the_same_on_eight_devices(way: str) -> None:
    """Windows shared out; the statistics of all are the sum of the devices'."""
    x = RNG.normal(size=(2 * DEVICES, 5, IN)).astype(np.float32)
    got = WAYS[way](lambda part: second_moment.update(second_moment.init(IN), part), parts(x))
    want = second_moment.update(second_moment.init(IN), x)
    assert_same(got.total.sum(axis=0), want.total)
    assert np.array_equal(got.samples, np.full(DEVICES, 2))


def block(seed: int) -> core.Ffn:
    """A random feed-forward part of 12 neurons and 6 channels."""
    rng = np.random.default_rng(seed)
    shapes = [(12, 6), (12, 6), (6, 12), 6, 12, 12, 6, 12, 6]
    up, gate, down, *norms = (rng.random(shape).astype(np.float32) for shape in shapes)
    return core.Ffn(up, (gate,), down, *norms)


@every_way
@pytest.mark.parametrize("make", [core.official_centrality, core.corrected_centrality])
@pytest.mark.parametrize("name", SCORERS)
def test_centralities_are_the_same_on_eight_devices(
    name: str, make: Callable[..., core.Centrality], way: str
) -> None:
    """Eight blocks, each on its device, from the same importance that comes in."""
    step = make(name, 0.5, 0.5, 0.3, True)
    blocks, carried = [block(i) for i in range(DEVICES)], np.linspace(1, 2, 6, dtype=np.float32)
    got = WAYS[way](step, jax.tree.map(lambda *xs: np.stack(xs), *blocks), everywhere(carried))
    want = expected(step)
    assert_same(got, want)


@functools.cache
def expected(step: core.Centrality) -> Any:
    """The eight results of plain calls, stacked."""
    one = jax.jit(step)
    found = [one(block(i), np.linspace(1, 2, 6, dtype=np.float32)) for i in range(DEVICES)]
    return jax.tree.map(lambda *xs: np.stack(xs), *found)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "wanda": ("wanda", {}),
    "magnitude": ("magnitude", {}),
    "admm": ("admm", {}),
    "llmrank": ("llmrank", {}),
    "llmrank rows": (
        "llmrank",
        {"scorer": "mpr", "scope": "global", "units": "rows", "variant": "official"},
    ),
}


MESHES = [
    ("wanda", "llama-gqa", "data=4,model=2"),
    ("llmrank", "llama-gqa", "data=4,model=2"),
    *(
        pytest.param(case, "llama-gqa", "data=4,model=2", marks=pytest.mark.slow)
        for case in ("magnitude", "admm", "llmrank rows")
    ),
    pytest.param("wanda", "opt", "data=8", marks=pytest.mark.slow),
    pytest.param("magnitude", "opt", "data=8", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "family", "mesh"), MESHES)
def test_a_mesh_leaves_the_same_masks(case: str, family: str, mesh: str) -> None:
    """Removed units are the same too, and blocks lie where the mesh puts them."""
    name, arguments = CASES[case]
    runs = [
        prune(model(family), METHODS[name](**arguments), tokens(8), Request(0.5), Runtime(mesh=m))
        for m in (None, make_mesh(mesh))
    ]
    (one, outcome), (many, outcome_many) = runs
    assert outcome.removed == outcome_many.removed
    if not outcome.removed:
        assert len(many.blocks[0].q.w.sharding.device_set) == DEVICES
    for got, want in zip(zeros(many), zeros(one), strict=True):
        for slot in want:
            assert np.array_equal(got[slot], want[slot]), slot
