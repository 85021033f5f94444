"""EvoPress: exact budgets, the fitness against NumPy, the search, its seeds and its resumption."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.journal import Journal
from calibration.runtime import Runtime
from models.errors import InputError
from pruning.allocation import evopress
from pruning.allocation.evopress_core import Unit, make_units, mutate, window_divergence
from pruning.allocation.evopress_trials import Trials
from pruning.budget import all_shapes
from pruning.methods import ALLOCATIONS, METHODS
from pruning.types import Layerwise, Outcome, Request, prune
from reference.sinks import NoBlocks
from reference.small import logits, model, same, tokens

SMALL = {
    "generations": 4,
    "offspring": 4,
    "survivors": (2,),
    "windows": (2, 4),
    "samples": 5,
    "step": 0.15,
}
LLAMA = [{"q": (4096, 4096), "v": (1024, 4096), "up": (14336, 4096), "down": (4096, 14336)}] * 2


def run(
    family: str = "llama", sparsity: float = 0.5, method: str = "wanda", **options: Any
) -> Outcome:
    runtime = options.pop("runtime", Runtime())
    seed = options.pop("seed", 0)
    allocation = ALLOCATIONS["evopress"](**{**SMALL, **options})
    request = Request(sparsity, allocation=allocation, seed=seed)
    return prune(model(family), METHODS[method](), tokens(), request, runtime)[1]


def even(shapes: list[dict[str, tuple[int, int]]], sparsity: float) -> list[dict[str, int]]:
    """Return the entries of each row that an even budget removes."""
    return [{slot: int(sparsity * inputs) for slot, (_, inputs) in b.items()} for b in shapes]


@pytest.mark.parametrize("kind", ["linear", "block"])
def test_a_level_is_the_same_number_of_weights_for_every_unit(kind: str) -> None:
    units = make_units(LLAMA, even(LLAMA, 0.7), kind, 0.025, 4)
    assert len(units) == (8 if kind == "linear" else 2)
    assert len({u.weights for u in units}) == 1
    for unit in units:
        shapes = LLAMA[unit.block]
        assert unit.weights == sum(shapes[slot][0] * n for slot, n in unit.steps.items())
        assert -4 <= unit.low <= 0 <= unit.high <= 4


def test_linears_of_widths_without_a_common_factor_step_by_their_rows() -> None:
    shapes = [{"q": (61, 61), "k": (61, 61), "up": (97, 61), "down": (61, 97)}]
    units = make_units(shapes, even(shapes, 0.5), "linear", 0.05, 4)
    assert all(u.weights % shapes[0][slot][0] == 0 for u in units for slot in u.steps)
    assert len({u.weights for u in units if "up" not in u.steps}) == 1


def test_levels_leave_every_row_an_entry_and_take_none_back_that_was_not_taken() -> None:
    shapes = [{"q": (8, 8), "k": (8, 8)}]
    units = make_units(shapes, even(shapes, 0.9), "linear", 0.3, 4)
    for unit in units:
        for slot, n in unit.steps.items():
            counts = [7 + level * n for level in (unit.low, unit.high)]
            assert counts[0] >= 0 and counts[1] <= shapes[0][slot][1] - 1


@pytest.mark.parametrize("seed", range(5))
def test_mutations_keep_the_number_of_removed_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = [10, 10, 10, 25, 25, 7]  # the last has no partner
    units = [Unit(0, {str(k): 1}, w, -2, 2) for k, w in enumerate(kinds)]
    levels = [0] * len(units)
    changed = set()
    for _ in range(200):
        new = mutate(levels, units, rng)
        assert sum(a * w for a, w in zip(new, kinds, strict=True)) == 0
        assert all(-2 <= level <= 2 for level in new) and new[-1] == 0
        # One to three switches, of two units each.
        assert sum(abs(a - b) for a, b in zip(new, levels, strict=True)) <= 6
        changed |= {k for k, level in enumerate(new) if level}
        levels = new
    assert changed == {0, 1, 2, 3, 4}


def test_the_fitness_is_the_divergence_of_the_next_token() -> None:
    rng = np.random.default_rng(0)
    head, dense, x = (rng.normal(size=s) for s in ((6, 9), (2, 5, 6), (2, 5, 6)))
    got = jax.jit(window_divergence, static_argnums=0)(
        lambda w, states: states @ w, *(jnp.asarray(a, jnp.float32) for a in (head, dense, x))
    )
    for k in range(2):
        p, q = (np.exp(s[k] @ head) for s in (dense, x))
        p, q = (a / a.sum(axis=1, keepdims=True) for a in (p, q))
        np.testing.assert_allclose(got[k], (p * np.log(p / q)).sum(axis=1).mean(), rtol=1e-5)


@pytest.mark.parametrize("method", ["wanda", pytest.param("sparsegpt", marks=pytest.mark.slow)])
def test_level_zero_is_the_model_that_an_even_run_gives(method: str) -> None:
    m, made, counts = model("llama-gqa"), METHODS[method](), None
    pruned, outcome = prune(m, made, tokens(), Request(0.5))
    shapes = all_shapes(m)
    counts = even(shapes, 0.5)
    units = make_units(shapes, counts, "linear", 0.15, 2)
    layerwise = Layerwise(made.pruner(made.unstructured), made.unstructured)
    trials = Trials(m, tokens(), 4, Runtime(batch=3), layerwise, units, shapes, counts)
    log_p, log_q = (jax.nn.log_softmax(logits(x, tokens()[[0, 3]])) for x in (m, pruned))
    want = float((jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    raised = [0] * len(units)
    raised[0], raised[7] = 1, -1
    got = trials.divergences([[0] * len(units), raised], [0, 3])
    assert got[0] == pytest.approx(want, rel=1e-4) and got[1] != got[0]
    assert outcome.asked


@pytest.mark.parametrize("family", ["llama-gqa", pytest.param("opt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", ["linear", pytest.param("block", marks=pytest.mark.slow)])
def test_the_budget_of_a_search_is_met_to_one_unit(family: str, unit: str) -> None:
    outcome, shapes = run(family, 0.6, unit=unit), all_shapes(model(family))
    removed = total = most = 0
    for asked, block in zip(outcome.asked, shapes, strict=True):
        for slot, (rows, columns) in block.items():
            removed += rows * int(asked[slot] * columns + 1e-9)
            total, most = total + rows * columns, max(most, rows)
    assert -0.5 <= 0.6 * total - removed <= most
    assert len(outcome.details["kl_of_generations"]) == SMALL["generations"]


def test_a_search_follows_its_seed_and_never_ends_worse_than_it_began() -> None:
    outcome = run()
    assert outcome.details["kl_found"] <= outcome.details["kl_even"]
    for best, parent in zip(
        outcome.details["kl_of_generations"], outcome.details["kl_of_parents"], strict=True
    ):
        assert best <= parent
    assert run().asked == outcome.asked
    other = run(seed=1)
    assert other.details["kl_of_generations"] != outcome.details["kl_of_generations"]


def test_a_search_that_was_killed_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(directory: Path) -> Any:
        journal = Journal(directory, {}, NoBlocks())
        m, made = model("llama"), METHODS["wanda"]()
        layerwise = Layerwise(made.pruner(made.unstructured), made.unstructured)
        return ALLOCATIONS["evopress"](**SMALL)(
            m, tokens(), Request(0.5), Runtime(journal=journal), layerwise
        )

    whole = search(tmp_path / "whole")
    before, calls = Trials.divergences, []

    def killed(self: Trials, *arguments: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 5:  # in the third generation
            raise KeyboardInterrupt
        return before(self, *arguments)

    monkeypatch.setattr(Trials, "divergences", killed)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "parts")
    monkeypatch.setattr(Trials, "divergences", before)
    tried = []
    generation = evopress.EvoPress._generation
    monkeypatch.setattr(
        evopress.EvoPress,
        "_generation",
        lambda self, number, *rest: tried.append(number) or generation(self, number, *rest),
    )
    again = search(tmp_path / "parts")
    assert tried == [2, 3]
    assert again.details == whole.details and same(again.budget, whole.budget)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegpt", "admm", "sparsellm", "magnitude", "ria"])
def test_every_weight_method_takes_the_search(method: str) -> None:
    outcome = run("llama-gqa", method=method, generations=2)
    assert np.mean(outcome.details["block_sparsity"]) == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
def test_a_mixture_is_searched_by_expert() -> None:
    m = model("mixtral")
    outcome = run("mixtral", generations=2)
    assert set(outcome.asked[0]) == {s.name for s in m.arch.slots_of(m.blocks[0])}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generations": 0}, "at least 1"),
        ({"step": 0.0}, "step=0.0"),
        ({"windows": (1, 2, 3)}, "one entry more"),
        ({"survivors": (0,)}, "at least 1"),
    ],
)
def test_arguments_out_of_range_are_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ALLOCATIONS["evopress"](**arguments)
