"""DLP, LSA and ATP against NumPy in float64: what they measure, and the budgets that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.observers import Gram
from calibration.runtime import Runtime
from models.arch import embed
from models.errors import InputError
from models.sharding import make_mesh
from pruning.allocation.atp import most, progression
from pruning.allocation.dlp_core import median, relative_importance
from pruning.allocation.lsa_core import group_counts, reconstruction_error
from pruning.budget import all_shapes, shapes_of
from pruning.methods import ALLOCATIONS, METHODS
from pruning.types import Allocator, Outcome, Request, prune
from reference import allocation as reference
from reference.small import FAMILIES, model, run_block, tokens, weight

every_family = pytest.mark.parametrize(
    "family",
    [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])],
)
SHARES = [
    ("dlp", {"alpha": 0.2}),
    ("lsa", {"beta": 0.2, "group": 8}),
    ("lsa", {"level": "sublayer", "beta": 0.2, "group": 8}),
    ("lsa", {"level": "linear", "beta": 0.2, "group": 8}),
    ("atp", {"beta": 0.1}),
]


def run(allocation: Allocator, family: str = "llama", sparsity: float = 0.5) -> Outcome:
    request = Request(sparsity, allocation=allocation)
    return prune(model(family), METHODS["wanda"](), tokens(), request)[1]


@pytest.mark.parametrize("sizes", [[5], [4, 6], [1, 1, 2], [30, 7, 64]])
def test_the_median_of_several_matrices_is_the_lower_one(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(3, n)).astype(np.float32) for n in sizes]
    xs[0][0] = xs[0][0, 0]  # ties
    every = np.sort(np.concatenate([x.ravel() for x in xs]))
    assert jax.jit(median)([jnp.asarray(x) for x in xs]) == every[(len(every) - 1) // 2]


@every_family
def test_dlp_takes_the_median_score_of_dense_blocks(family: str) -> None:
    outcome = run(ALLOCATIONS["dlp"](alpha=0.2), family)
    want = reference.medians(model(family), tokens())
    np.testing.assert_allclose(outcome.details["medians"], want, rtol=1e-5)
    got = np.array(outcome.details["block_sparsity"])
    spread = reference.spread(reference.share_of_sum(want), 0.5, 0.2)
    np.testing.assert_allclose(got, spread, atol=0.03)
    assert np.array_equal(np.argsort(got), np.argsort(want)), "the least median loses least"


@pytest.mark.parametrize(("inputs", "group"), [(12, 4), (11, 4), (7, 16)])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_lsa_removes_greedily_in_groups(inputs: int, group: int, share: float) -> None:
    rng = np.random.default_rng(3)
    w = rng.normal(size=(5, inputs)).astype(np.float32)
    x = rng.normal(size=(40, inputs)) @ rng.normal(size=(inputs, inputs))  # correlated inputs
    h = x.T @ x
    stats = Gram(jnp.asarray(h, jnp.float32), jnp.float32(1))
    counts = jnp.asarray(group_counts(inputs, group, share))
    rows = jax.jit(reconstruction_error, static_argnums=3)(jnp.asarray(w), stats, counts, group)
    want = [reference.greedy_error(w[i : i + 1], h, group, share) for i in range(5)]
    np.testing.assert_allclose(rows, want, rtol=1e-4)


def test_lsa_of_independent_inputs_is_the_sum_of_the_lowest_scores() -> None:
    rng = np.random.default_rng(0)
    w, d = rng.normal(size=(3, 8)), rng.uniform(1, 2, 8)
    stats = Gram(jnp.asarray(np.diag(d), jnp.float32), jnp.float32(1))
    rows = reconstruction_error(jnp.asarray(w, jnp.float32), stats, jnp.asarray([4]), 8)
    np.testing.assert_allclose(rows, np.sort(w**2 * d, axis=1)[:, :4].sum(axis=1), rtol=1e-5)


@every_family
def test_lsa_measures_dense_blocks_and_spreads_by_its_parts(family: str) -> None:
    m = model(family)
    x, want = embed(m.arch, m.non_block, tokens()), []
    for block in m.blocks:
        x, taps = run_block(m, block, x)
        errors = {}
        for s in m.arch.slots:
            rows = taps[s.reads].reshape(-1, taps[s.reads].shape[-1])
            h = rows.T @ rows / len(tokens())
            errors[s.name] = reference.greedy_error(weight(block, s.name), h, 8, 0.5)
        want.append(errors)
    outcome = run(ALLOCATIONS["lsa"](beta=0.2, level="linear", group=8), family)
    flat = [e for errors in want for e in errors.values()]
    got = [e for errors in outcome.details["error_of_greedy_pruning"] for e in errors.values()]
    np.testing.assert_allclose(got, flat, rtol=1e-3)
    asked = [f for block in outcome.asked for f in block.values()]
    spread = reference.spread(reference.share_of_sum(flat), 0.5, 0.2)
    shift = np.array(asked) - spread  # the same for all, but for whole entries
    assert np.ptp(shift) <= 1 / 16 + 1e-9
    by_block = run(ALLOCATIONS["lsa"](beta=0.2, group=8), family).details["block_sparsity"]
    means = [np.mean([*errors.values()]) for errors in want]
    want_blocks = reference.spread(reference.share_of_sum(means), 0.5, 0.2)
    np.testing.assert_allclose(by_block, want_blocks, atol=0.04)


def test_the_parts_of_lsa_share_a_sparsity() -> None:
    m = model("llama")
    for level, parts in (
        ("block", [{s.name for s in m.arch.slots}]),
        ("sublayer", [{"q", "k", "v", "o"}, {"gate", "up", "down"}]),
    ):
        for block in run(ALLOCATIONS["lsa"](beta=0.2, level=level, group=8)).asked:
            for part in parts:
                assert np.ptp([block[slot] for slot in part]) <= 1 / 16 + 1e-9


def test_equal_parts_are_equally_important() -> None:
    np.testing.assert_allclose(relative_importance(np.array([1.0, 1.0, 2.0])), [0.75, 0.75, 0.5])
    assert np.array_equal(relative_importance(np.zeros(3)), np.ones(3))


def test_atp_is_the_arithmetic_progression_of_the_paper() -> None:
    np.testing.assert_allclose(progression(5, 0.7, 0.02), reference.progression(5, 0.7, 0.02))
    assert most(32, 0.7) == pytest.approx(0.6 / 31) and most(1, 0.7) == pytest.approx(0.6)
    edge = progression(32, 0.7, most(32, 0.7))
    assert edge.max() == pytest.approx(1) and edge.min() == pytest.approx(0.4)


@pytest.mark.slow
def test_atp_takes_the_step_of_least_loss() -> None:
    outcome = run(ALLOCATIONS["atp"](trials=3, samples=2))
    betas, losses = outcome.details["betas"], outcome.details["losses"]
    assert len(betas) == 4 and betas[0] == 0 and betas[-1] == pytest.approx(most(3, 0.5))
    assert outcome.details["beta"] == betas[int(np.argmin(losses))]
    given = run(ALLOCATIONS["atp"](beta=outcome.details["beta"]))
    assert given.asked == outcome.asked


@pytest.mark.parametrize(("name", "arguments"), SHARES)
@pytest.mark.parametrize("sparsity", [0.3, 0.71])
def test_budgets_are_met_to_one_unit(name: str, arguments: dict, sparsity: float) -> None:
    m = model("llama-gqa")
    outcome = run(ALLOCATIONS[name](**arguments), "llama-gqa", sparsity)
    removed = total = unit = 0
    for asked, block in zip(outcome.asked, [shapes_of(m, b) for b in m.blocks], strict=True):
        for slot, (rows, columns) in block.items():
            removed += rows * int(asked[slot] * columns + 1e-9)
            total, unit = total + rows * columns, max(unit, rows)
    assert -0.5 <= sparsity * total - removed <= unit


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(n, a) for n, a in SHARES if a.get("level") != "sublayer"],
)
def test_the_official_variant_rounds_each_block_alone(name: str, arguments: dict) -> None:
    m, sparsity = model("llama"), 0.9
    outcome = run(ALLOCATIONS[name](**arguments, variant="official"), sparsity=sparsity)
    fractions = [f for block in outcome.asked for f in block.values()]
    assert max(fractions) <= 0.99 and min(fractions) >= 0.01
    corrected = run(ALLOCATIONS[name](**arguments), sparsity=sparsity)
    assert outcome.asked != corrected.asked
    assert len(outcome.asked) == len(all_shapes(m))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("dlp", {}, marks=pytest.mark.slow),
        pytest.param("lsa", {"level": "linear", "group": 8}, marks=pytest.mark.slow),
        pytest.param("atp", {"trials": 2, "samples": 4}, marks=pytest.mark.slow),
        pytest.param(
            "evopress",
            {"generations": 2, "offspring": 4, "windows": (2, 4), "step": 0.15, "samples": 4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_eight_devices_allocate_as_one(name: str, arguments: dict) -> None:
    outcomes = []
    for mesh in ("data=1", "data=4,model=2"):
        runtime = Runtime(batch=4, mesh=make_mesh(mesh))
        request = Request(0.6, allocation=ALLOCATIONS[name](**arguments))
        outcomes.append(prune(model("llama"), METHODS["wanda"](), tokens(), request, runtime)[1])
    assert outcomes[0].asked == outcomes[1].asked


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dlp", pytest.param("lsa", marks=pytest.mark.slow)])
def test_mixtures_are_measured_by_expert(family: str, name: str) -> None:
    m = model(family)
    outcome = run(ALLOCATIONS[name](), family)
    for block, asked in zip(m.blocks, outcome.asked, strict=True):
        assert set(asked) == {s.name for s in m.arch.slots_of(block)}
    assert np.isfinite(outcome.details["block_sparsity"]).all()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dlp", {"alpha": -0.1}, "alpha=-0.1"),
        ("lsa", {"beta": 1.0}, "beta=1.0"),
        ("lsa", {"group": 0}, "group=0"),
        ("lsa", {"share": 1.0}, "share=1.0"),
        ("atp", {"beta": float("nan")}, "beta=nan"),
        ("atp", {"trials": 0}, "trials=0"),
    ],
)
def test_arguments_out_of_range_are_bad_input(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ALLOCATIONS[name](**arguments)
