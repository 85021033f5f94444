"""LLMRank over whole models: importance and selection against the float64 port, and removal."""

import functools
from typing import Any

import numpy as np
import pytest

from calibration import passes
from calibration.runtime import Runtime
from models.arch import Model, embed
from models.errors import InputError
from models.surgery import cut, mask
from pruning.budget import Uniform
from pruning.structured import llmrank_importance as wiring
from pruning.structured.llmrank import LLMRank
from pruning.types import Outcome, Request, prune
from reference import llmrank as reference
from reference.llmrank import Graph, Settings
from reference.small import FAMILIES, kept, logits, model, run_block, same, tokens, weight

SCORERS: dict[str, tuple[dict[str, Any], Settings]] = {
    "wpr": ({"scorer": "wpr", "gamma": 0.6, "theta": 0.3}, Settings("wpr", 0.6, 0.3)),
    "mpr": ({"scorer": "mpr"}, Settings("mpr")),
    "mpr zeroed": ({"scorer": "mpr", "zero_pruned": True}, Settings("mpr", zeroed=0.3)),
    "norm": ({"scorer": "norm"}, Settings("norm")),
}
PORTS = {"corrected": reference.corrected, "official": reference.official}
NAMES = {
    "llama": ("up", ("gate",), "down"),
    "llama-gqa": ("up", ("gate",), "down"),
    "opt": ("fc1", (), "fc2"),
}


def graphs(m: Model, family: str, batch: int) -> list[Graph]:
    """Return the graph of every feed-forward part, with norms from the blocks' taps."""
    up, gates, down = NAMES[family]
    parts: list[Graph] = []
    x = embed(m.arch, m.non_block, tokens())
    for block in m.blocks:
        x, taps = run_block(m, block, x)

        def norms(name: str, taps: Any = taps) -> np.ndarray:
            batches = np.split(taps[name], len(taps[name]) // batch)
            return np.mean([np.linalg.norm(x, axis=(0, 1)) for x in batches], axis=0)

        weights = weight(block, up), tuple(weight(block, g) for g in gates), weight(block, down)
        parts.append(Graph(*weights, norms("mlp_in"), norms(up), norms("mlp_mid"), norms(down)))
    return parts


def run(m: Model, sparsity: float = 0.5, **arguments: Any) -> tuple[Model, Outcome]:
    """Run LLMRank with micro-batches of three windows."""
    return prune(m, LLMRank(**arguments), tokens(), Request(sparsity), Runtime(batch=3))


@pytest.mark.parametrize("variant", PORTS)
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("llama", name) for name in SCORERS),
        pytest.param("opt", "wpr", marks=pytest.mark.slow),
        pytest.param("opt", "mpr zeroed", marks=pytest.mark.slow),
    ],
)
def test_scores_equal_those_of_the_port(family: str, name: str, variant: str) -> None:
    arguments, settings = SCORERS[name]
    m, (up, _, down) = model(family), NAMES[family]
    _, outcome = run(m, units="rows", variant=variant, **arguments)
    for got, (rows, channels) in zip(
        outcome.scores, PORTS[variant](settings, graphs(m, family, 3), True), strict=True
    ):
        np.testing.assert_allclose(got[up], rows, rtol=2e-4)
        np.testing.assert_allclose(got[down], channels, rtol=2e-4)


def test_the_default_is_corrected_weighted_page_rank_on_whole_neurons() -> None:
    """gamma is 0 in the official variant and 0.5 in the corrected one."""
    m = model("llama")
    for variant, gamma in {"corrected": 0.5, "official": 0.0}.items():
        named = run(
            m,
            variant=variant,
            scorer="wpr",
            gamma=gamma,
            theta=0.5,
            units="neurons",
            scope="local",
            chain=True,
        )
        assert same(run(m, variant=variant)[0].blocks, named[0].blocks)
    assert same(run(m)[0].blocks, run(m, variant="corrected")[0].blocks)
    assert not same(
        run(m)[1].scores[0]["up"], run(m, variant="corrected", gamma=0.0)[1].scores[0]["up"]
    )


@pytest.mark.parametrize(
    ("family", "scope"), [*((family, "local") for family in FAMILIES), ("llama", "global")]
)
def test_neurons_are_cut_with_all_their_weights_and_biases(family: str, scope: Any) -> None:
    """The lowest scores of each block are removed, and the cut computes what the mask computes."""
    m, (up, gates, down) = model(family), NAMES[family]
    new, outcome = run(m, scope=scope)
    keeps = [kept(outcome, i, down, 24) for i in range(3)]
    for block, old, scores, removed, keep in zip(
        new.blocks, m.blocks, outcome.scores, outcome.removed, keeps, strict=True
    ):
        for name in (up, *gates):
            assert removed[name].cut and removed[name].rows == removed[down].columns
            got, was = getattr(block, name), getattr(old, name)
            assert np.array_equal(got.w, np.asarray(was.w)[keep])
            assert got.b is None or np.array_equal(got.b, np.asarray(was.b)[keep])
        assert np.array_equal(getattr(block, down).w, np.asarray(getattr(old, down).w)[:, keep])
        assert same(getattr(block, down).b, getattr(old, down).b)
        assert same(
            (block.q, block.k, block.v, block.o, block.attn_norm),
            (old.q, old.k, old.v, old.o, old.attn_norm),
        )
        assert scores[up][~keep].max() < scores[up][keep].min() or scope == "global"
    assert sum((~k).sum() for k in keeps) == 36
    group = m.arch.group("neurons")
    masked = m._replace(
        blocks=tuple(mask(b, group, k) for b, k in zip(m.blocks, keeps, strict=True))
    )
    np.testing.assert_allclose(
        logits(new, tokens()), logits(masked, tokens()), rtol=1e-4, atol=1e-4
    )
    assert not np.allclose(logits(new, tokens()), logits(m, tokens()), rtol=1e-2)


def test_global_neurons_are_the_lowest_of_all_blocks() -> None:
    m = model("llama")
    new, outcome = run(m, scope="global")
    keeps, scores = (
        [kept(outcome, i, "down", 24) for i in range(3)],
        [s["up"] for s in outcome.scores],
    )
    assert max(s[~k].max(initial=0) for s, k in zip(scores, keeps, strict=True)) < min(
        s[k].min() for s, k in zip(scores, keeps, strict=True)
    )
    assert len({b.up.w.shape for b in new.blocks}) > 1


@pytest.mark.parametrize("variant", PORTS)
def test_scores_equal_those_of_the_port_where_blocks_differ_in_width(variant: Any) -> None:
    """As in a model that was pruned before."""
    m, (arguments, settings) = model("llama"), SCORERS["wpr"]
    narrow = cut(m.blocks[1], m.arch.group("neurons"), np.arange(24) % 2 == 0)
    ragged = m._replace(blocks=(m.blocks[0], narrow, m.blocks[2]))
    _, outcome = run(ragged, units="rows", variant=variant, **arguments)
    for got, (rows, channels) in zip(
        outcome.scores, PORTS[variant](settings, graphs(ragged, "llama", 3), True), strict=True
    ):
        np.testing.assert_allclose(got["up"], rows, rtol=2e-4)
        np.testing.assert_allclose(got["down"], channels, rtol=2e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_are_zeroed_with_their_biases_and_nothing_else(family: str) -> None:
    m, (up, gates, down) = model(family), NAMES[family]
    new, outcome = run(m, units="rows", variant="official", scope="global", scorer="mpr")
    for i, (block, old) in enumerate(zip(new.blocks, m.blocks, strict=True)):
        for name, units in ((up, 24), (down, 16)):
            keep, got, was = kept(outcome, i, name, units), getattr(block, name), getattr(old, name)
            assert not outcome.removed[i][name].cut
            assert np.array_equal(got.w, np.where(keep[:, None], was.w, 0))
            assert got.b is None or np.array_equal(got.b, np.where(keep, was.b, 0))
        assert all(getattr(block, g) is getattr(old, g) for g in gates)


@pytest.mark.parametrize("chain", [True, False], ids=["chained", "isolated"])
def test_official_global_selection_removes_a_count_of_rows(chain: bool) -> None:
    """`ceil(share)` of the rows of a list: the whole model, or one block without a chain."""
    m = model("llama")
    _, outcome = run(
        m, 0.3, units="rows", variant="official", scope="global", scorer="mpr", chain=chain
    )
    pairs = reference.official(Settings("mpr"), graphs(m, "llama", 3), chain)
    lists = [pairs] if chain else [[pair] for pair in pairs]
    want = [count for part in lists for count in reference.official_global_counts(part, 0.3)]
    counts = [len(linears[name].rows) for linears in outcome.removed for name in ("up", "down")]
    assert counts == want
    assert sum(want) == (36 if chain else 3 * 12)


def test_corrected_global_rows_meet_the_budget_in_parameters() -> None:
    """To the nearest row: one of up holds 16 parameters, one of down 24. The best rows stay."""
    m = model("llama")
    for sparsity in (0.25, 0.9):
        _, outcome = run(m, sparsity, units="rows", scope="global", scorer="activation")
        spent = sum(
            16 * len(removed["up"].rows) + 24 * len(removed["down"].rows)
            for removed in outcome.removed
        )
        assert abs(spent - sparsity * 3 * 2 * 16 * 24) <= 12
        for scores, removed in zip(outcome.scores, outcome.removed, strict=True):
            assert all(
                int(np.argmax(scores[name])) not in removed[name].rows for name in ("up", "down")
            )


@pytest.mark.parametrize("variant", PORTS)
def test_several_scans_give_what_one_gives(variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more than STACK_BYTES take several scans, with the importance carried between."""
    m, arguments = model("llama"), SCORERS["wpr"][0]
    one = run(m, variant=variant, **arguments)
    two_blocks = 2 * 4 * 3 * 24 * 16
    for limit, lengths in ((1, [1, 1, 1]), (two_blocks, [2, 1]), (two_blocks - 1, [1, 1, 1])):
        monkeypatch.setattr(wiring, "STACK_BYTES", limit)
        stats = [{"neurons": {"a_up": np.zeros(24), "a_in": np.zeros(16)}}] * 3
        assert [len(r) for r in wiring._stacks(stats, 3)] == lengths
        many = run(m, variant=variant, **arguments)
        assert same(one[0].blocks, many[0].blocks)
        for a, b in zip(one[1].scores, many[1].scores, strict=True):
            np.testing.assert_allclose(a["up"], b["up"], rtol=1e-6)


def test_statistics_cost_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is pruned on the way, so no block runs a second time."""
    monkeypatch.setattr(passes, "apply_block", None)
    run(model("llama"))


def test_zero_pruned_changes_modified_page_rank() -> None:
    m = model("llama")
    runs = {z: run(m, scorer="mpr", zero_pruned=z)[1].scores[0]["up"] for z in (False, True)}
    assert not np.allclose(runs[False], runs[True], rtol=1e-3)


@pytest.mark.parametrize("units", ["neurons", "rows"])
def test_the_outcome_holds_the_request_the_removal_and_the_scores(units: Any) -> None:
    _, outcome = run(model("llama"), 0.25, units=units)
    slots = {"neurons": {"gate", "up", "down"}, "rows": {"up", "down"}}[units]
    assert all(asked == dict.fromkeys(slots, 0.25) for asked in outcome.asked)
    assert all(removed.keys() == slots for removed in outcome.removed)
    assert all(
        scores.keys() == slots - {"gate"} - ({"down"} if units == "neurons" else set())
        for scores in outcome.scores
    )
    assert (
        outcome.scores_label
        == {"neurons": "importance of MLP neurons (wpr)", "rows": "importance of rows (wpr)"}[units]
    )


def test_all_neurons_may_be_removed() -> None:
    """99 % of 24 rounds to all: one neuron of zeros stays, and blocks run as attention alone."""
    new, _ = run(model("opt"), 0.99)
    assert [b.fc1.w.shape for b in new.blocks] == [(1, 16)] * 3 and not any(
        np.asarray(b.fc2.w).any() for b in new.blocks
    )
    assert np.isfinite(logits(new, tokens())).all()


@pytest.mark.parametrize(
    "bad", [{"gamma": -0.1}, {"gamma": 1.5}, {"gamma": float("nan")}, {"theta": 2.0}]
)
def test_shares_must_lie_between_0_and_1(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        LLMRank(**bad)  # type: ignore[arg-type]


def test_requests_for_weight_methods_are_refused() -> None:
    """Before anything is computed."""
    refuse = functools.partial(prune, model("llama"), LLMRank(), tokens()[:0])
    with pytest.raises(
        InputError,
        match=r"^pattern=2:4 is for weight methods, and llmrank removes whole units: leave it out$",
    ):
        refuse(Request(0.5, pattern=(2, 4)))
    with pytest.raises(
        InputError,
        match=r"^allocation is for weight methods, and llmrank sets its own: leave it out$",
    ):
        refuse(Request(0.5, allocation=Uniform()))
