"""Budgets exact to one unit, allocators against NumPy and with every weight method."""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from calibration import passes
from calibration.runtime import Runtime
from eval.perplexity import perplexity
from models.arch import Model
from models.checkpoint import reader as store
from models.checkpoint import writer
from models.errors import InputError
from pruning.allocation import alpha, neuroal_trials
from pruning.allocation.neuroal_core import misalignment, row_fractions, schedule
from pruning.budget import all_shapes, by_block, meet_sparsity, shapes_of
from pruning.budget_core import MAX_FRACTION, fraction_for_count, fractions_from_scores
from pruning.methods import ALLOCATIONS, METHODS
from pruning.types import Allocator, Budget, Outcome, Request, prune
from reference import allocation as reference
from reference.small import CONFIGS, FAMILIES, VOCAB, logits, model, same, tokens, weight, zeros

SEARCHES = {
    "owl": {"m": 2.0, "lam": 0.2},
    "alpha": {"epsilon": 0.3},
    "neuroal": {"samples": 4},
    "dlp": {"alpha": 0.2},
    "lsa": {"level": "linear", "beta": 0.2, "group": 8},
    "atp": {"trials": 2, "samples": 4},
}
# The quick tests take the first family, the slow ones the others.
every_family = pytest.mark.parametrize(
    "family",
    [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])],
)


def run(
    family: str,
    allocation: Allocator,
    sparsity: float = 0.5,
    method: str = "wanda",
    runtime: Runtime = Runtime(),  # noqa: B008, frozen
) -> tuple[Model, Outcome]:
    return prune(
        model(family),
        METHODS[method](),
        tokens(),
        Request(sparsity, allocation=allocation),
        runtime,
    )


@pytest.mark.parametrize("total", [*range(1, 300), 576, 4096, 11008, 28672])
def test_fraction_of_gives_its_count_back(total: int) -> None:
    counts = np.arange(total + 1)
    assert np.array_equal((fraction_for_count(counts, total) * total).astype(int), counts)


def random_budget(m: Model, rng: np.random.Generator) -> Budget:
    """Fractions of linears and of rows, some of them out of bounds."""
    budget = []
    for block in m.blocks:
        shapes = shapes_of(m, block)
        by_row = rng.random() < 0.5
        budget.append(
            {
                slot: rng.uniform(-0.3, 1.4, shape[0] if by_row else ())
                for slot, shape in shapes.items()
            }
        )
    return tuple(budget)


@every_family
@pytest.mark.parametrize("sparsity", [0.005, 0.1, 0.5, 0.7, 0.93])
def test_exact_meets_the_sparsity_to_one_unit(family: str, sparsity: float) -> None:
    m, rng = model(family), np.random.default_rng(7)
    shapes = [shapes_of(m, block) for block in m.blocks]
    for _ in range(20):
        budget = random_budget(m, rng)
        got = meet_sparsity(budget, shapes, sparsity)
        removed = total = 0
        for asked, fractions, block in zip(budget, got, shapes, strict=True):
            for slot, (rows, columns) in block.items():
                counts = (np.broadcast_to(fractions[slot], rows) * columns).astype(int)
                removed, total = removed + counts.sum(), total + rows * columns
                assert fractions[slot].shape == np.shape(asked[slot])
                assert counts.min() >= 0 and counts.max() < columns, "a row keeps something"
        unit = max(rows for block in shapes for rows, _ in block.values())
        by_row = all(np.ndim(f) for fractions in got for f in fractions.values())
        assert -0.5 <= sparsity * total - removed <= (1 if by_row else unit)


def test_exact_changes_what_is_exact_already_by_nothing_and_keeps_the_order() -> None:
    m = model("llama")
    shapes = [shapes_of(m, block) for block in m.blocks]
    assert meet_sparsity(by_block(m, np.full(3, 0.5)), shapes, 0.5) == by_block(m, np.full(3, 0.5))
    got = meet_sparsity(by_block(m, np.array([0.2, 0.9, 1.3])), shapes, 0.6)
    assert float(got[0]["q"]) < float(got[1]["q"]) < float(got[2]["q"]) <= MAX_FRACTION


def test_a_sparsity_beyond_the_bounds_moves_them() -> None:
    m = model("llama")
    shapes = [shapes_of(m, block) for block in m.blocks]
    for sparsity in (0.002, 0.9375):
        got = meet_sparsity(by_block(m, np.array([0.1, 0.5, 0.9])), shapes, sparsity)
        total = sum(
            float(f) * np.prod(b[s])
            for fractions, b in zip(got, shapes, strict=True)
            for s, f in fractions.items()
        )
        assert total / sum(np.prod(shape) for b in shapes for shape in b.values()) == pytest.approx(
            sparsity, abs=0.01
        )


def test_shapes_of_a_checkpoint_are_known_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model("llama-gqa")
    writer.save(tmp_path / "model", m, CONFIGS["llama-gqa"] | {"vocab_size": VOCAB}, tmp_path)
    lazy = store.open_checkpoint(tmp_path / "model").model

    def read(*_: Any) -> None:
        raise AssertionError("a block was read")

    monkeypatch.setattr(store, "fetch", read)
    assert all_shapes(lazy) == all_shapes(m) == [shapes_of(m, block) for block in m.blocks]


def test_densities_are_linear_in_scores() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=9)
    got = fractions_from_scores(values, 0.6, 0.1)
    np.testing.assert_allclose(got, reference.spread(values, 0.6, 0.1), rtol=1e-12)
    assert got.mean() == pytest.approx(0.6) and np.ptp(got) == pytest.approx(0.2)
    assert np.argmin(got) == np.argmax(values)


@pytest.mark.parametrize("values", [np.zeros(4), np.full(4, 3.0), np.array([2.0])])
def test_equal_scores_give_equal_fractions(values: np.ndarray) -> None:
    assert np.array_equal(fractions_from_scores(values, 0.7, 0.2), np.full(len(values), 0.7))


@every_family
def test_owl_counts_outliers(family: str) -> None:
    """Far enough above the mean that float32 and float64 see the same entries."""
    _, outcome = run(family, ALLOCATIONS["owl"](m=2, lam=0.2))
    want = reference.outliers(model(family), tokens(), 2)
    np.testing.assert_allclose(outcome.details["outliers"], want, rtol=1e-3)
    got = np.array(outcome.details["block_sparsity"])
    np.testing.assert_allclose(got, reference.spread(want, 0.5, 0.2), atol=0.03)
    assert np.array_equal(np.argsort(got), np.argsort(want)[::-1])


@pytest.mark.parametrize("released", [True, False])
@every_family
def test_alpha_fits_spectra(family: str, released: bool) -> None:
    m = model(family)
    for block in m.blocks:
        for slot in m.arch.slots:
            got = alpha.exponent(getattr(block, slot.name).w, released)
            assert got == pytest.approx(
                reference.exponent(weight(block, slot.name), released), rel=1e-3
            ), slot.name


def test_alpha_of_a_power_law_is_its_exponent() -> None:
    """The tail has exponent 3, in a matrix with random singular vectors."""
    rng = np.random.default_rng(0)
    e = (1 - (np.arange(400) + 0.5) / 400) ** (-1 / 2)  # quantiles of density ~ e^-3 from 1
    u, v = (np.linalg.qr(rng.normal(size=(400, 400)))[0] for _ in range(2))
    w = jnp.asarray(u * np.sqrt(e) @ v, jnp.float32)
    assert alpha.exponent(w) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(
    "w", [np.zeros((4, 6)), np.eye(5), np.ones((3, 1))], ids=["zero", "identity", "column"]
)
def test_a_matrix_without_a_spectrum_has_no_exponent(w: np.ndarray) -> None:
    assert alpha.exponent(jnp.asarray(w, jnp.float32)) == 0


def test_misalignment_is_blind_to_a_common_factor() -> None:
    a, b = np.array([1.0, 2.0, 1.0]), np.array([2.0, 4.0, 2.0])
    assert misalignment(a, b) == 0, "a factor common to all channels does not count"
    assert misalignment(a, np.array([1.0, 1.0, 2.0])) == pytest.approx(np.sqrt(2) / 4 / 3)
    assert misalignment(np.zeros(3), np.zeros(3)) == 0 and np.isfinite(misalignment(a, np.zeros(3)))


def test_schedules_rise_evenly_and_rows_follow_their_drop() -> None:
    np.testing.assert_allclose(schedule(5, 0.7, 0.2), [0.5, 0.6, 0.7, 0.8, 0.9])
    assert np.array_equal(schedule(1, 0.7, 0.2), [0.7])
    np.testing.assert_allclose(row_fractions(np.array([0.0, 4.0, 2.0]), 0.6, 0.1), [0.7, 0.5, 0.6])
    assert np.array_equal(row_fractions(np.array([1.0, -1.0]), 0.6, 0.1), [0.6, 0.6]), (
        "as released: told by the sum"
    )


@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "phi"])
@pytest.mark.slow
def test_released_block_scores_are_the_loops(family: str) -> None:
    _, outcome = run(family, ALLOCATIONS["neuroal"](step="block", samples=4, variant="official"))
    d = outcome.details
    for lam in (0.01, 0.1, 0.25):
        got = d["block_scores"][d["block_lambdas"].index(lam)]
        want = reference.misalignment(
            model(family), tokens()[:4], np.linspace(0.5 - lam, 0.5 + lam, 3)
        )
        assert got == pytest.approx(want, rel=1e-4)
    assert d["block_lambda"] == d["block_lambdas"][int(np.argmin(d["block_scores"]))]
    np.testing.assert_allclose(
        d["block_sparsity"], np.linspace(0.5 - d["block_lambda"], 0.5 + d["block_lambda"], 3)
    )


@every_family
@pytest.mark.slow
def test_scores_are_losses_of_the_model_that_a_trial_prunes(family: str) -> None:
    """Wanda's masks by dense activations, evaluated on the search windows."""
    from calibration.observers import second_moment
    from calibration.passes import calibrate_blocks
    from pruning.weights.patterns import per_row
    from pruning.weights.per_linear import with_weights
    from pruning.weights.scores import wanda

    m, s = model(family), 0.5
    _, outcome = run(family, ALLOCATIONS["neuroal"](step="block", samples=4), s)
    d, blocks = outcome.details, []
    budget = meet_sparsity(by_block(m, schedule(3, s, 0.1)), [shapes_of(m, b) for b in m.blocks], s)

    def visit(i: int, block: Any, stats: Any) -> Any:
        new = {}
        for slot in m.arch.slots:
            w = getattr(block, slot.name).w
            kept = per_row.keep(
                wanda(w, stats[slot.reads]), per_row.counts(w.shape, budget[i][slot.name])
            )
            new[slot.name] = jnp.where(kept, w, 0)
        blocks.append(with_weights(block, new))
        return block, None

    calibrate_blocks(
        m,
        tokens()[:4],
        Runtime(),
        visit,
        watch={s.reads: second_moment for s in m.arch.slots},
        propagate="dense",
        name="masks by hand",
    )
    want = perplexity(m._replace(blocks=tuple(blocks)), tokens()[:4]).cross_entropy.mean()
    assert d["block_scores"][d["block_lambdas"].index(0.1)] == pytest.approx(want, rel=1e-5)
    assert d["block_lambda"] == d["block_lambdas"][int(np.argmin(d["block_scores"]))]


@every_family
@pytest.mark.parametrize("variant", [pytest.param("official", marks=pytest.mark.slow), "corrected"])
def test_rows_get_their_own_fractions(family: str, variant: Any) -> None:
    m = model(family)
    pruned, outcome = run(family, ALLOCATIONS["neuroal"](samples=4, variant=variant), 0.6)
    assert outcome.details["row_lambda"] in outcome.details["row_lambdas"]
    left = [
        {slot: np.unique((~zero).sum(axis=1)) for slot, zero in gone.items()}
        for gone in zeros(pruned)
    ]
    if outcome.details["row_lambda"] > 0:
        assert any(len(counts) > 1 for block in left[:-1] for counts in block.values())
    assert all(counts.min() > 0 for block in left for counts in block.values()), "no row vanishes"
    assert np.isfinite(logits(pruned, tokens())).all()
    assert len(outcome.asked) == len(m.blocks)


@functools.cache
def allocated(name: str, method: str, family: str) -> tuple[Model, Outcome]:
    return run(family, ALLOCATIONS[name](**SEARCHES[name]), 0.6, method)


# Every method on one family; the others with a method that prunes and one that repairs.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "family"),
    [
        *(
            (m, FAMILIES[0])
            for m in ("magnitude", "wanda", "multiflow", "ria", "sparsegpt", "sparsellm", "admm")
        ),
        *itertools.product(("wanda", "sparsegpt"), FAMILIES[1:]),
    ],
)
@pytest.mark.parametrize("name", SEARCHES)
def test_every_allocator_works_with_every_weight_method(
    name: str, method: str, family: str
) -> None:
    """The sparsity is met to one unit, and what patterns round off in column blocks."""
    pruned, outcome = allocated(name, method, family)
    gone = [zero for block in zeros(pruned) for zero in block.values()]
    total, removed = sum(z.size for z in gone), sum(z.sum() for z in gone)
    unit = max(len(z) for z in gone) + len(gone)
    assert abs(removed - 0.6 * total) <= unit
    assert np.isfinite(logits(pruned, tokens())).all()
    sparsity = outcome.details["block_sparsity"]
    assert len(sparsity) == 3 and all(0 < s < 1 for s in sparsity)
    if name == "neuroal" and method == "magnitude":
        assert (
            "neuroal: the method cannot follow rows, only blocks were searched" in outcome.warnings
        )


@pytest.mark.parametrize("name", SEARCHES)
def test_of_a_sparsity_of_zero_nothing_is_removed(name: str) -> None:
    pruned, _ = run("llama", ALLOCATIONS[name](**SEARCHES[name]), 0.0)
    assert same(pruned.blocks, model("llama").blocks)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_the_dense_model_is_watched_once_if_there_is_room(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then only the first of a search's walks runs dense blocks; what is found is the same."""
    calls: list[int] = []

    def counted(arch: Any, watch: Any, i: int, block: Any, xs: Any, onward: bool = False) -> Any:
        calls.append(i)
        return passes.observe(arch, watch, i, block, xs, onward)

    monkeypatch.setattr(neuroal_trials, "observe", counted)
    found = []
    for room in (neuroal_trials.DENSE_BYTES, -1):
        monkeypatch.setattr(neuroal_trials, "DENSE_BYTES", room)
        calls.clear()
        pruned, outcome = run("llama", ALLOCATIONS["neuroal"](samples=4), method=method)
        found.append((pruned.blocks, outcome.details, len(calls)))
    (one, known, few), (other, again, many) = found
    blocks, walks = (
        len(one),
        2 + (method != "magnitude"),
    )  # coarse, fine, and rows where the method can follow them
    assert many - few == (walks - 1) * blocks
    assert same(one, other) and known == again


@pytest.mark.slow
def test_the_search_does_not_hang_on_how_trials_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run("llama-gqa", ALLOCATIONS["neuroal"](samples=4))[1].details
    monkeypatch.setattr("pruning.allocation.neuroal_trials.TRIAL_BYTES", 1)
    single = run("llama-gqa", ALLOCATIONS["neuroal"](samples=4), runtime=Runtime(batch=3))[
        1
    ].details
    np.testing.assert_allclose(single["block_scores"], whole["block_scores"], rtol=1e-5)
    np.testing.assert_allclose(single["row_scores"], whole["row_scores"], rtol=1e-5)


@pytest.mark.slow
def test_searches_say_how_far_they_are() -> None:
    told: list[str] = []

    def stage(what: str, steps: int, **_: Any) -> Any:
        count = itertools.count(1)
        return lambda: told.append(f"{what} {next(count)}/{steps}")

    run("llama", ALLOCATIONS["neuroal"](samples=2), runtime=Runtime(progress=stage))
    assert told[-4:] == [
        "trying row-wise sparsities 3/3",
        "pruning 1/3",
        "pruning 2/3",
        "pruning 3/3",
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("owl", {"m": 0}, "m=0 must be positive"),
        ("owl", {"lam": -0.1}, "lam=-0.1"),
        ("alpha", {"epsilon": 1.0}, "epsilon=1.0"),
        ("neuroal", {"samples": 0}, "samples=0"),
    ],
)
def test_arguments_out_of_range_are_bad_input(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ALLOCATIONS[name](**arguments)


def test_rows_of_a_method_with_one_threshold_are_bad_input() -> None:
    with pytest.raises(InputError, match='use step="block"'):
        run("llama", ALLOCATIONS["neuroal"](step="row"), method="magnitude")
    with pytest.raises(InputError, match='use step="block"'):
        run("llama", ALLOCATIONS["neuroal"](step="row", variant="official"), method="sparsegpt")
