"""SparseGPT against the paper's algorithm in NumPy; its factor, damping and error."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.observers import Gram
from models.errors import InputError
from pruning import linalg as inverse
from pruning.methods import METHODS
from pruning.types import Allocation, Mask, Pattern, Request, prune
from pruning.weights import per_linear, sparsegpt
from pruning.weights import sparsegpt_core as core
from pruning.weights.patterns import n_of_m, per_column_block, per_matrix
from reference import sparsegpt as reference
from reference.small import model, tokens, zeros

DAMP = 0.01
BLOCKS = per_column_block(core.COLUMNS)
Pairs = list[tuple[np.ndarray, np.ndarray]]


@functools.cache
def hessian(inputs: int, dead: int | None = None) -> np.ndarray:
    """A well-conditioned H of mixed inputs [inputs inputs]; its diagonal spans a factor of ten."""
    rng = np.random.default_rng(inputs)
    mixed = np.eye(inputs) + 0.5 * rng.normal(size=(inputs, inputs)) / np.sqrt(inputs)
    x = rng.normal(size=(8 * inputs, inputs)) @ mixed * np.linspace(0.6, 2, inputs)
    if dead is not None:
        x[:, dead] = 0
    return (x.T @ x / len(x)).astype(np.float32)


def matrices(inputs: int, rows: Sequence[int] = (6, 17, 3)) -> list[np.ndarray]:
    """Random weights that read the same inputs: solved in one sweep, compared one by one."""
    rng = np.random.default_rng(inputs + 1)
    return [rng.normal(size=(n, inputs)).astype(np.float32) for n in rows]


@functools.partial(jax.jit, static_argnums=0)
def run(
    pattern: Pattern, ws: Sequence[jax.Array], total: jax.Array, counts: Sequence[jax.Array]
) -> list[tuple[jax.Array, Mask]]:
    """Factored and solved, compiled once for each pattern and shapes."""
    f = core.factor(core.hessian(Gram(total, jnp.float32(2))), DAMP)  # 2/n = 1: H is the sum itself
    return core.solve(ws, f, counts, pattern.keep, pattern.group)


def solved(
    ws: Sequence[np.ndarray],
    h: np.ndarray,
    pattern: Pattern,
    fraction: float | Sequence[np.ndarray],
    dtype: str = "float32",
) -> Pairs:
    """(W, removed) of each matrix; `fraction`: one for all, or those of each matrix's rows."""
    fractions = [fraction] * len(ws) if isinstance(fraction, float) else fraction
    counts = [pattern.counts(w.shape, np.asarray(f)) for w, f in zip(ws, fractions, strict=True)]
    found = run(pattern, [jnp.asarray(w, dtype) for w in ws], jnp.asarray(h), counts)
    return [(np.asarray(w), ~np.asarray(kept)) for w, kept in found]


def assert_agrees(got: Pairs, want: Pairs) -> None:
    """The same entries are removed, and the others agree to 1e-5 of the largest weight."""
    for (w, gone), (w64, gone64) in zip(got, want, strict=True):
        assert np.array_equal(gone, gone64)
        assert np.array_equal(w == 0, gone)
        np.testing.assert_allclose(w, w64, rtol=1e-5, atol=1e-5 * np.abs(w64).max())


def quadratic(w: np.ndarray, new: np.ndarray, h: np.ndarray) -> float:
    """||W X - W' X||^2, from H = X X^T."""
    change = (w - new).astype(np.float64)
    return float(np.sum(change @ h * change))


@pytest.mark.parametrize("fraction", [0.3, pytest.param(0.7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dead", [None, 5])
@pytest.mark.parametrize(
    "inputs", [40, *(pytest.param(n, marks=pytest.mark.slow) for n in (128, 200)), 300]
)
def test_unstructured_is_algorithm_1(inputs: int, dead: int | None, fraction: float) -> None:
    """Less than a block of columns, one block, and blocks with a shorter last one."""
    h, ws = hessian(inputs, dead), matrices(inputs)
    assert_agrees(solved(ws, h, BLOCKS, fraction), [reference.solve(w, h, fraction) for w in ws])


@pytest.mark.parametrize(
    ("inputs", "n", "m"),
    [
        (40, 2, 4),
        (300, 3, 6),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(128, 2, 4), (300, 2, 4), (40, 4, 8), (200, 4, 8), (42, 3, 6), (126, 3, 6)]
        ),
    ],
)
@pytest.mark.parametrize("dead", [None, 9])
def test_groups_are_algorithm_1(inputs: int, n: int, m: int, dead: int | None) -> None:
    """Groups are chosen when the sweep reaches them; 6 does not divide a block's 128 columns."""
    h, ws = hessian(inputs, dead), matrices(inputs)
    got = solved(ws, h, n_of_m(n, m), 0.5)
    assert_agrees(got, [reference.solve(w, h, 0.5, (n, m)) for w in ws])
    for _, gone in got:
        assert np.all(gone.reshape(len(gone), -1, m).sum(axis=2) == n)


@pytest.mark.parametrize("inputs", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_a_budget_of_rows_is_kept_by_every_row(inputs: int) -> None:
    h, ws = hessian(inputs), matrices(inputs)
    fractions = [np.linspace(0, 0.93, len(w)) for w in ws]
    got = solved(ws, h, BLOCKS, fractions)
    for (_, gone), fraction in zip(got, fractions, strict=True):
        assert gone.sum(axis=1).tolist() == [int(inputs * f) for f in fraction]
    assert_agrees(got, [reference.solve(w, h, f) for w, f in zip(ws, fractions, strict=True)])


def test_weights_keep_their_type() -> None:
    """Solved in float32 from the bfloat16 numbers, and rounded once."""
    h, w = hessian(40), matrices(40)[0]
    rounded = np.asarray(jnp.asarray(w, jnp.bfloat16).astype(jnp.float32))
    ((got, gone),) = solved([w], h, BLOCKS, 0.5, "bfloat16")
    ((want, same),) = solved([rounded], h, BLOCKS, 0.5)
    assert got.dtype == jnp.bfloat16
    assert np.array_equal(gone, same) and np.array_equal(got, jnp.asarray(want, jnp.bfloat16))


@pytest.mark.parametrize(
    ("inputs", "panel"),
    [(1, 2048), (40, 2048), (300, 2048), (300, 100), (300, 299), (37, 5), (3, 1)],
)
def test_the_factor_is_upper_and_of_the_inverse(
    inputs: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and in panels, which may not divide it."""
    monkeypatch.setattr(inverse, "PANEL", panel)
    h = hessian(inputs)
    u = np.asarray(jax.jit(lambda h: core.inverse_factor(h))(jnp.asarray(h))).astype(np.float64)
    assert np.array_equal(u, np.triu(u)) and np.all(np.diag(u) > 0)
    want = np.linalg.inv(h.astype(np.float64))
    np.testing.assert_allclose(u.T @ u, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_dead_inputs_and_damping_are_those_of_the_official_code() -> None:
    """H_ii of a dead input is 1 before the mean is taken, so the scale 2/n shows."""
    total = np.diag([3.0, 0.0, 6.0]).astype(np.float32)
    h = core.hessian(Gram(jnp.asarray(total), jnp.float32(6)))
    np.testing.assert_allclose(h, total / 3, rtol=1e-6)
    np.testing.assert_allclose(
        core.damped(h, 0.1), np.diag(np.array([1.0, 1.0, 2.0]) + 0.1 * 4 / 3), rtol=1e-6
    )
    f = core.factor(h, 0.1)
    assert f.dead.tolist() == [False, True, False]
    assert float(f.damping) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "inputs", [40, *(pytest.param(n, marks=pytest.mark.slow) for n in (128, 200))]
)
def test_alike_and_independent_inputs_make_it_magnitude_pruning(inputs: int) -> None:
    """H = 3 I leaves nothing to correct, and each block of columns has its own threshold."""
    for w, (new, gone) in zip(
        matrices(inputs),
        solved(matrices(inputs), 3 * np.eye(inputs, dtype=np.float32), BLOCKS, 0.5),
        strict=True,
    ):
        for part in np.split(np.arange(inputs), range(128, inputs, 128)):
            score = np.abs(w[:, part])
            kept = per_matrix.keep(
                jnp.asarray(score), per_matrix.counts(score.shape, np.float64(0.5))
            )
            assert np.array_equal(gone[:, part], ~np.asarray(kept))
        assert np.array_equal(new, np.where(gone, 0, w))


@pytest.mark.parametrize(
    "pattern", [BLOCKS, n_of_m(2, 4), n_of_m(3, 6)], ids=["unstructured", "2:4", "3:6"]
)
def test_the_error_is_below_that_of_the_mask_alone(pattern: Pattern) -> None:
    """||W X - W' X|| falls for every row, and clearly for all together."""
    h, ws = hessian(300), matrices(300)
    for w, (new, gone) in zip(ws, solved(ws, h, pattern, 0.5), strict=True):
        masked = np.where(gone, 0, w)
        assert all(
            quadratic(a, b, h) < quadratic(a, c, h) for a, b, c in zip(w, new, masked, strict=True)
        )
        assert quadratic(w, new, h) < 0.95 * quadratic(w, masked, h)


def indefinite(lowest: float) -> np.ndarray:
    """A symmetric matrix [40 40] of eigenvalues 1, and this one; its mean diagonal is almost 1."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    return ((q * np.where(np.arange(40) == 7, lowest, 1.0)) @ q.T).astype(np.float32)


@pytest.mark.parametrize("panel", [2048, 16])
@pytest.mark.parametrize(
    ("lowest", "damp", "found"),
    [(0.5, 0.01, 0.01), (-0.05, 0.01, 0.1), (-0.5, 0.01, 1.0), (-5e-4, 0.0, 1e-3)],
)
def test_damping_is_raised_tenfold_until_h_factors(
    lowest: float, damp: float, found: float, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From none at all the first raise is to 1e-6."""
    monkeypatch.setattr(inverse, "PANEL", panel)
    f = jax.jit(lambda h: core.factor(h, damp))(jnp.asarray(indefinite(lowest)))
    assert float(f.damping) == pytest.approx(found)
    h = indefinite(lowest).astype(np.float64)
    want = np.linalg.inv(h + found * np.mean(np.diag(h)) * np.eye(40))
    np.testing.assert_allclose(
        np.asarray(f.u).T @ np.asarray(f.u), want, rtol=1e-3, atol=1e-3 * np.abs(want).max()
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_h_that_no_damping_mends_is_bad_input(value: float) -> None:
    stats = Gram(jnp.full((40, 40), value, jnp.float32), jnp.float32(4))
    _, notes = per_linear.prepare_tap(sparsegpt.pruner(DAMP, BLOCKS), stats, "attn")
    with pytest.raises(
        InputError,
        match=r"block 3, attn: no damping makes its statistics solvable: use more, or other",
    ):
        per_linear.figures(3, {"attn": notes})


def test_raised_damping_is_a_warning() -> None:
    """One sentence for each block and input that needed it, after those of the allocation."""
    details = {"damping": [{"attn": 0.01, "mlp": 0.1}, {}, {"attn": 0.010001}]}
    warnings = ["block 0, mlp: damping raised from 0.01 to 0.1, H did not factor"]
    assert sparsegpt.damping_warnings(0.01, details) == warnings
    m = model("llama")
    budget = tuple({slot.name: np.float64(0.5) for slot in m.arch.slots} for _ in m.blocks)
    method = dataclasses.replace(METHODS["magnitude"](), warn=lambda details: ["after"])
    request = Request(0.5, allocation=lambda *_: Allocation(budget, warnings=("before",)))
    assert prune(m, method, tokens(), request)[1].warnings == ("before", "after")


def test_a_run_on_too_few_tokens_raises_damping_and_says_so() -> None:
    """Three tokens cannot span sixteen inputs; undamped, H of every input is singular."""
    m = model("llama")
    pruned, outcome = prune(m, METHODS["sparsegpt"](damp=0.0), tokens(1, 3), Request(0.5))
    found = outcome.details["damping"]
    assert [set(taps) for taps in found] == [{slot.reads for slot in m.arch.slots}] * 3
    raised = [(i, tap, x) for i, taps in enumerate(found) for tap, x in taps.items() if x > 0]
    assert raised
    assert outcome.warnings == tuple(
        f"block {i}, {tap}: damping raised from 0 to {x:g}, H did not factor"
        for i, tap, x in raised
    )
    assert all(np.all(np.isfinite(w)) for w in jax.tree.leaves(tuple(pruned.blocks)))


def test_a_run_as_it_should_be_warns_of_nothing() -> None:
    """And every linear loses a half, one more for its threshold."""
    m = model("opt")
    pruned, outcome = prune(m, METHODS["sparsegpt"](), tokens(16, 12), Request(0.5))
    assert outcome.warnings == ()
    assert all(
        x == pytest.approx(0.01) for taps in outcome.details["damping"] for x in taps.values()
    )
    assert {
        int(gone.sum()) - gone.size // 2 for taps in zeros(pruned) for gone in taps.values()
    } == {1}


def test_negative_damping_is_bad_input() -> None:
    for damp in (-0.01, float("nan")):
        with pytest.raises(InputError, match="must not be negative"):
            METHODS["sparsegpt"](damp=damp)


def test_equal_arguments_make_one_pruner() -> None:
    """Pruners are static arguments of jit: a fresh one would compile again."""
    assert sparsegpt.pruner(0.01, n_of_m(2, 4)) is sparsegpt.pruner(0.01, n_of_m(2, 4))
    assert sparsegpt.pruner(0.01, BLOCKS) is not sparsegpt.pruner(0.02, BLOCKS)
