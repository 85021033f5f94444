"""Searched widths: exact budgets, nested levels, trials against float64 fits, resumption."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from calibration.journal import Journal
from calibration.runtime import Runtime
from models.arch import Block, Model, embed, linear_of, with_linears
from models.errors import InputError
from models.layers import Linear
from models.sharding import make_mesh
from models.surgery import mask
from pruning.allocation import evopress, width_trials
from pruning.allocation.evopress_core import mutate
from pruning.allocation.width_core import Size, moves, width_units
from pruning.methods import ALLOCATIONS, METHODS
from pruning.structured.repair_core import RIDGE
from pruning.structured.widths import Selection, Widths
from pruning.types import Outcome, Request, prune
from reference.sinks import NoBlocks
from reference.small import logits, model, run_block, same, tokens

SMALL = {
    "generations": 3,
    "offspring": 3,
    "survivors": (2,),
    "windows": (1, 3),
    "samples": 4,
    "step": 0.1,
    "levels": 2,
}
SIZES = [{"heads": Size(8, 6, 512.0), "neurons": Size(100, kept, 48.0)} for kept in (40, 1, 100)]


@functools.cache
def run(
    name: str, family: str, arguments: tuple = (), search: bool = True
) -> tuple[Model, Outcome]:
    allocation = ALLOCATIONS["evopress"](**SMALL) if search else None
    method = METHODS[name](**dict(arguments))
    return prune(model(family), method, tokens(), Request(0.4, allocation=allocation))


def test_levels_take_as_many_units_in_every_block_and_leave_one() -> None:
    units = width_units(SIZES, 0.1, 4, 8)
    assert {(kind, n) for u in units for kind, n in u.steps.items()} == {
        ("heads", 1),
        ("neurons", 8),
    }
    assert {(u.weights, *u.steps) for u in units} == {(512, "heads"), (384, "neurons")}
    bounds = [(u.low, u.high) for u in units if "neurons" in u.steps]
    assert bounds == [(-4, 4), (-4, 0), (0, 4)]


@pytest.mark.parametrize("seed", range(3))
def test_mutations_of_widths_keep_the_number_of_each_kind(seed: int) -> None:
    units, rng = width_units(SIZES, 0.05, 3), np.random.default_rng(seed)
    levels, seen = [0] * len(units), set()
    for _ in range(100):
        levels = mutate(levels, units, rng)
        more = moves(units, levels, len(SIZES))
        for kind in ("heads", "neurons"):
            assert sum(own[kind] for own in more) == 0
            for own, block in zip(more, SIZES, strict=True):
                assert 1 <= block[kind].kept + own[kind] <= block[kind].units
        seen |= {k for k, level in enumerate(levels) if level}
    assert len(seen) == len(units)


def selection_of(name: str, m: Model, sparsity: float, **arguments: Any) -> Selection:
    """The choice that a method hands to an allocation."""
    seen: list[Selection] = []

    class Seen(evopress.EvoPress):
        def widths(self, *given: Any) -> Widths:
            seen.append(given[-1])
            return Widths(seen[0], {})

    prune(m, METHODS[name](**arguments), tokens(), Request(sparsity, allocation=Seen()))
    return seen[0]


def test_wider_blocks_keep_what_narrower_ones_keep_best_first() -> None:
    part = selection_of("flap", model("llama"), 0.5, refit=False).parts[0]["neurons"]
    before = part.widened(1 - part.size.kept).stays
    assert before.sum() == 1
    for count in range(2, 1 + part.size.units):
        now = part.widened(count - part.size.kept).stays
        (new,) = np.flatnonzero(now & ~before)
        assert now.sum() == count and not (before & ~now).any()
        assert part.units.scores[new] >= part.units.scores[~now].max(initial=-np.inf)
        before = now


def fitted(m: Model, i: int, x: jax.Array, keeps: dict[str, np.ndarray]) -> Block:
    """A dense block with masked units, its readers fitted in float64 to their own outputs."""
    block = m.blocks[i]
    taps = run_block(m, block, x)[1]
    for kind, stays in keeps.items():
        group = m.arch.group(kind)
        dense = linear_of(block, group.reader.name)
        block = mask(block, group, stays)
        if stays.all():
            continue
        w = np.asarray(dense.w, np.float64)
        inputs = taps[m.arch.tap(group.reader.name)].reshape(-1, w.shape[1])
        mean, c = inputs.mean(axis=0), np.cov(inputs.T, bias=True)
        k = np.repeat(stays, group.reader.width)
        held = c[np.ix_(k, k)] + RIDGE * np.diag(c)[k].mean() * np.eye(k.sum())
        new = np.zeros_like(w)
        new[:, k] = w[:, k] + np.linalg.solve(held, c[np.ix_(k, ~k)] @ w[:, ~k].T).T
        b = (w - new) @ mean + (0 if dense.b is None else np.asarray(dense.b))
        reader = Linear(np.asarray(new, np.float32), np.asarray(b, np.float32))
        block = with_linears(block, {group.reader.name: reader})
    return block


@pytest.mark.parametrize("family", ["llama-gqa", pytest.param("opt", marks=pytest.mark.slow)])
def test_a_trial_is_the_model_with_the_readers_of_its_levels(family: str) -> None:
    """Fitted in float64; the inputs of each block come from those before it at level 0."""
    m = model(family)
    own = selection_of("flap", m, 0.4, structure="AL-AM")
    units = width_units(own.sizes, 0.1, 2)
    raised = [0] * len(units)
    for k, unit in enumerate(units):  # whatever they can take: trials need no exact budget
        raised[k] = unit.high if k % 2 else unit.low
    trials = width_trials.WidthTrials(m, tokens(), 4, Runtime(batch=4), own, units)
    got = trials.divergences([[0] * len(units), raised], [0, 3])
    x, at_zero = embed(m.arch, m.non_block, tokens()), []
    mixed = []
    for i, (narrow, wide) in enumerate(
        zip(own.parts, own.moved(moves(units, raised, len(m.blocks))).parts, strict=True)
    ):
        at_zero.append(fitted(m, i, x, {kind: part.stays for kind, part in narrow.items()}))
        mixed.append(fitted(m, i, x, {kind: part.stays for kind, part in wide.items()}))
        x = run_block(m, at_zero[-1], x)[0]
    assert got[0] != pytest.approx(got[1], rel=1e-2)
    for blocks, value in ((at_zero, got[0]), (mixed, got[1])):
        pair = (logits(n, tokens()[[0, 3]]) for n in (m, m._replace(blocks=tuple(blocks))))
        log_p, log_q = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in pair)
        want = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
        assert value == pytest.approx(want, rel=2e-3)


CASES = [
    ("flap", "llama-gqa", (("structure", "AL-AM"),)),
    ("flap", "opt", (("structure", "UL-UM"), ("refit", False))),
    ("flap", "llama", (("variant", "official"),)),
    ("flap", "mixtral", ()),
    ("flap", "olmo2", (("structure", "UL-UM"),)),
    ("flap", "llama-gqa", (("bias", False), ("round_to", 4))),
    ("wanda_sp", "llama", (("scope", "global"), ("repair", "refit"))),
    ("magnitude_sp", "llama-gqa", (("scope", "global"),)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family", "arguments"), CASES)
def test_a_search_removes_as_many_weights_as_the_method(
    name: str, family: str, arguments: tuple
) -> None:
    searched, outcome = run(name, family, arguments)
    plain, own = run(name, family, arguments, search=False)
    sizes = [
        sum(x.size for x in jax.tree.leaves([b.replace() for b in m.blocks]) if x.ndim > 1)
        for m in (searched, plain)
    ]
    assert sizes[0] == sizes[1]
    for kind in ("kept_heads", "kept_neurons"):
        counts = [sum(np.size(k) for k in o.details[kind]) for o in (outcome, own)]
        assert counts[0] == counts[1]
    assert outcome.details["kl_found"] <= outcome.details["kl_even"]
    assert np.isfinite(logits(searched, tokens()[:1])).all()


def test_other_allocations_and_scopes_are_bad_input() -> None:
    def ask(method: Any, allocation: str) -> None:
        request = Request(0.4, allocation=ALLOCATIONS[allocation]())
        method.check(model("llama"), request)

    with pytest.raises(InputError, match=r"flap removes whole units.*evopress"):
        ask(METHODS["flap"](), "owl")
    with pytest.raises(InputError, match="wanda_sp"):
        ask(METHODS["wanda_sp"](), "evopress")
    ask(METHODS["wanda_sp"](scope="global"), "evopress")


@pytest.mark.slow
def test_a_search_of_widths_that_was_killed_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model("llama")
    own = selection_of("flap", m, 0.4)

    def search(directory: Path) -> Any:
        runtime = Runtime(journal=Journal(directory, {}, NoBlocks()))
        allocation = ALLOCATIONS["evopress"](**SMALL)
        return allocation.widths(m, tokens(), Request(0.4), runtime, own)

    whole = search(tmp_path / "whole")
    before, calls = width_trials.WidthTrials.divergences, []

    def killed(self: Any, *arguments: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 4:  # in the second generation
            raise KeyboardInterrupt
        return before(self, *arguments)

    monkeypatch.setattr(width_trials.WidthTrials, "divergences", killed)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "parts")
    monkeypatch.setattr(width_trials.WidthTrials, "divergences", before)
    again = search(tmp_path / "parts")
    assert again.details == whole.details
    assert same(again.selection.keeps(), whole.selection.keeps())


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["data=8", "data=2,model=2"])
def test_a_search_of_widths_is_the_same_on_several_devices(shards: str) -> None:
    def search(mesh: Any) -> Outcome:
        request = Request(0.4, allocation=ALLOCATIONS["evopress"](**SMALL))
        runtime = Runtime(batch=8, mesh=mesh)
        return prune(model("llama"), METHODS["flap"](), tokens(8), request, runtime)[1]

    one, many = search(make_mesh("data=1")), search(make_mesh(shards))
    assert many.details["kept_neurons"] == one.details["kept_neurons"]
    assert many.details["kl_found"] == pytest.approx(one.details["kl_found"], rel=1e-4)
