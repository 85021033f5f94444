"""Wanda, magnitude and LLM-Rank against goldens of the authors' own code."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.observers import SecondMoment, second_moment
from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Block
from pruning.structured.llmrank import ZEROED, LLMRank, Scope
from pruning.structured.llmrank_core import official_centrality
from pruning.structured.llmrank_importance import importance, measure_norms
from pruning.types import Request, prune
from pruning.weights import scores
from pruning.weights.patterns import n_of_m, per_row
from reference.golden import (
    SPARSITY,
    Reference,
    assert_perplexity,
    bits,
    golden,
    index,
    load,
    pruned,
    tiny,
)
from reference.small import weight, zeros

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs")]

RANKS = {
    "wpr-default": {"scorer": "wpr"},
    "wpr-g0.5": {"scorer": "wpr", "gamma": 0.5, "theta": 0.5},
    "mpr-zF": {"scorer": "mpr"},
    "mpr-zT": {"scorer": "mpr", "zero_pruned": True},
    "norm": {"scorer": "norm"},
    "activation": {"scorer": "activation"},
    "wanda": {"scorer": "wanda"},
}
CHAINS = {"chained": True, "isolated": False}
Pairs = list[tuple[np.ndarray, np.ndarray]]  # by block: arrays for rows of up and of down


def groups(x: np.ndarray, m: int) -> np.ndarray:
    """Return every m consecutive inputs together, [out in/m m]."""
    return x.reshape(len(x), -1, m)


def follow(
    r: Reference,
    masks: Mapping[str, np.ndarray],
    see: Callable[[str, jax.Array, SecondMoment, np.ndarray], None],
) -> None:
    """Visit the blocks as the authors' run did, pruned by its masks.

    `see` gets each linear's name, weights, statistics and mask.
    """

    def visit(i: int, block: Block, stats: Any) -> tuple[Block, None]:
        new = {}
        for slot in r.model.arch.slots:
            linear, name = getattr(block, slot.name), r.names[i][slot.name]
            mask = bits(masks[f"mask:{name}"], linear.w.shape)
            see(name, linear.w, stats[slot.reads], mask)
            new[slot.name] = linear.replace(w=jnp.where(mask, 0, linear.w))
        return block.replace(**new), None

    watch = {slot.reads: second_moment for slot in r.model.arch.slots}
    calibrate_blocks(
        r.model, r.calibration, Runtime(), visit, watch=watch, propagate="pruned", name="following"
    )


@pytest.mark.parametrize("variant", SPARSITY)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_wanda_masks_every_linear_as_the_golden_run(
    shared: pathlib.Path, name: str, variant: str
) -> None:
    """To the bit, but for a pair or two within a relative 1e-5 of the boundary."""
    sparsity, pattern = SPARSITY[variant]
    own = n_of_m(*pattern) if pattern else per_row

    def see(linear: str, w: jax.Array, stats: SecondMoment, mask: np.ndarray) -> None:
        score = scores.wanda(w, stats)
        count = own.counts(w.shape, np.float64(sparsity))
        m = pattern[1] if pattern else w.shape[1]
        together, differing = (
            groups(np.asarray(score), m),
            groups(mask == np.asarray(own.keep(score, count)), m),
        )
        boundary = np.sort(together, axis=2)[..., count - 1 : count]
        assert np.all((np.abs(together - boundary) <= 1e-5 * boundary)[differing]), linear
        assert differing.sum() <= 4, linear

    follow(tiny(shared, name), golden(shared, name, f"wanda-{variant}"), see)


def without_the_tie(r: Reference) -> Reference:
    """Return tiny-llama with one weight larger by a relative 1e-6.

    At 50 % two scores of block 2's down, row 108, inputs 109 and 425, lie 6e-8 apart at the row's
    boundary: half a unit in the last place of float32. Each processor's rounding of the sums
    decides which one is pruned, and all later blocks follow. The authors' run kept input 109.
    """
    block = r.model.blocks[2]
    w = block.down.w.at[108, 109].multiply(1 + 1e-6)
    blocks = (*r.model.blocks[:2], block.replace(down=block.down.replace(w=w)), *r.model.blocks[3:])
    return dataclasses.replace(r, model=r.model._replace(blocks=blocks))


@pytest.mark.parametrize("variant", SPARSITY)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_a_whole_wanda_run_equals_the_golden_run(
    shared: pathlib.Path, name: str, variant: str
) -> None:
    """No bit differs, not even in ties at inputs that are never active."""
    r, want = tiny(shared, name), golden(shared, name, f"wanda-{variant}")
    if (name, variant) == ("tiny-llama", "0.5"):
        r = without_the_tie(r)
    model = pruned(r, "wanda", variant)
    same = [
        got[slot] == bits(want[f"mask:{linear}"], got[slot].shape)
        for names, got in zip(r.names, zeros(model), strict=True)
        for slot, linear in names.items()
    ]
    assert np.all(np.concatenate([s.ravel() for s in same]))
    assert_perplexity(r, model, want["window_ce"])


def test_wanda_masks_the_first_block_of_smollm2_as_the_golden_run(
    shared: pathlib.Path, smollm2: pathlib.Path
) -> None:
    """To the bit. Over all thirty, a pair that rounding swaps changes every later block's input."""
    r, want = (
        load(smollm2, shared / "golden/tokens/smollm2"),
        golden(shared, "smollm2", "wanda-0.5"),
    )
    first = dataclasses.replace(
        r, model=r.model._replace(blocks=r.model.blocks[:1]), names=r.names[:1]
    )
    got = zeros(pruned(first, "wanda", "0.5"))[0]
    for slot, linear in r.names[0].items():
        assert np.array_equal(got[slot], bits(want[f"mask:{linear}"], got[slot].shape)), linear


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_statistics_equal_those_of_the_wanda_run(shared: pathlib.Path, name: str) -> None:
    """The absolute tolerance is for channels that ReLU leaves almost always zero."""
    want = golden(shared, name, "wanda-0.5-stats")

    def see(linear: str, w: jax.Array, stats: SecondMoment, mask: np.ndarray) -> None:
        np.testing.assert_allclose(
            stats.per_sample, want[f"scaler_row:{linear}"], rtol=1e-5, atol=1e-7, err_msg=linear
        )

    follow(tiny(shared, name), golden(shared, name, "wanda-0.5"), see)


@pytest.mark.parametrize("variant", ["0.5", "0.7"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_magnitude_masks_equal_the_golden_run(
    shared: pathlib.Path, name: str, variant: str
) -> None:
    """Masks of two blocks are stored, hashes of all."""
    r, want = tiny(shared, name), golden(shared, name, f"magnitude-{variant}")
    hashes = index(shared)[name, f"magnitude-{variant}"]["mask_sha256"]
    model = pruned(r, "magnitude", variant)
    for i, (names, got) in enumerate(zip(r.names, zeros(model), strict=True)):
        for slot, linear in names.items():
            assert hashlib.sha256(np.packbits(got[slot])).hexdigest() == hashes[linear], linear
            if i in (0, 4):
                assert np.array_equal(got[slot], bits(want[f"mask:{linear}"], got[slot].shape)), (
                    linear
                )
    assert_perplexity(r, model, want["window_ce"])


@pytest.mark.parametrize("variant", ["2of4", "4of8"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_magnitude_groups_differ_only_in_ties(
    shared: pathlib.Path, name: str, variant: str
) -> None:
    """torch.topk has its own order of ties; the index counts the groups where that matters."""
    r, want, n, m = (
        tiny(shared, name),
        golden(shared, name, f"magnitude-{variant}"),
        int(variant[0]),
        int(variant[-1]),
    )
    ties = index(shared)[name, f"magnitude-{variant}"]["magnitude_ties_at_threshold"]
    for names, got, dense in zip(
        r.names, zeros(pruned(r, "magnitude", variant)), r.model.blocks, strict=True
    ):
        for slot, linear in names.items():
            expected, ordered = (
                bits(want[f"mask:{linear}"], got[slot].shape),
                np.sort(np.abs(groups(weight(dense, slot), m)), axis=2),
            )
            differing = (groups(got[slot], m) != groups(expected, m)).any(axis=2)
            ambiguous = ordered[..., n - 1] == ordered[..., n]
            assert ambiguous.sum() == ties[linear], linear
            assert not (differing & ~ambiguous).any(), linear


class Ranked(NamedTuple):
    """A model with the statistics of its dense pass, which every scorer of LLM-Rank reads."""

    reference: Reference
    stats: list[dict[str, Any]]


@functools.cache
def ranked(r: Reference) -> Ranked:
    """Measure the statistics with the official runs' micro-batches of four."""
    norms = measure_norms(r.model, r.calibration, Runtime(batch=4))
    return Ranked(r, [dict(block["neurons"]) for block in norms])


def by_block(flat: np.ndarray, stats: list[dict[str, Any]], keys: tuple[str, str]) -> Pairs:
    """Split a golden's vector over all linears into a pair for each block.

    `keys` name statistics of the linears' widths.
    """
    parts = np.split(flat, np.cumsum([s[k].shape[0] for s in stats for k in keys])[:-1])
    return list(zip(parts[::2], parts[1::2], strict=True))


def assert_rows(got: np.ndarray, want: np.ndarray, importance: np.ndarray) -> None:
    """Assert that the same rows are removed, apart from those within 2e-6 of the boundary."""
    assert got.sum() == want.sum()
    if want.any():
        boundary = np.sort(importance)[want.sum() - 1]
        assert np.all(np.abs(importance[got != want] - boundary) <= 2e-6 * boundary)


def check_ranks(shared: pathlib.Path, name: str, r: Ranked, scorer: str, chain: str) -> None:
    """Check importances to a relative 1e-4, and the rows that both scopes remove."""
    entry = index(shared)[name, f"llmrank-{scorer}-{chain}"]
    masks, other = golden(shared, name, entry["variant"]), entry["importance_identical_to"]
    stored = masks if "importance" in masks else golden(shared, name, other)
    want = by_block(stored["importance"], r.stats, ("a_up", "a_down"))
    s = {"gamma": 0.0, "theta": 0.5, "zero_pruned": False, **RANKS[scorer]}
    centrality = official_centrality(
        s["scorer"], s["gamma"], s["theta"], ZEROED * s["zero_pruned"], CHAINS[chain]
    )
    stats = [{"neurons": block} for block in r.stats]
    ranks = importance(r.reference.model, stats, centrality, False, 0)
    got = [block["neurons"] for block in ranks]
    for pair, expected in zip(got, want, strict=True):
        for a, b in zip(pair, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)
    scopes: tuple[Scope, ...] = ("local", "global")
    for scope in scopes:
        removed = by_block(
            bits(masks[f"pruned_rows:{scope}0.3"], stored["importance"].shape),
            r.stats,
            ("a_up", "a_down"),
        )
        method = LLMRank(scope=scope, units="rows", chain=CHAINS[chain], variant="official")
        kept = method._keep_rows(got, 0.3)
        for keep, expected_rows, expected in zip(kept, removed, want, strict=True):
            for linear in (0, 1):
                assert_rows(~keep[linear], expected_rows[linear], expected[linear])


def check_activations(shared: pathlib.Path, name: str, r: Ranked) -> None:
    """Check the norms of the inputs and outputs of up and down, to a relative 1e-4."""
    want = golden(shared, name, "llmrank-activation-chained")
    for field, keys in {
        "in_activation": ("a_in", "a_mid"),
        "out_activation": ("a_up", "a_down"),
    }.items():
        for s, pair in zip(r.stats, by_block(want[field], r.stats, keys), strict=True):
            for key, expected in zip(keys, pair, strict=True):
                np.testing.assert_allclose(s[key], expected, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-gqa"])
def test_llmrank_activations_equal_the_golden_run(shared: pathlib.Path, name: str) -> None:
    check_activations(shared, name, ranked(tiny(shared, name)))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("scorer", RANKS)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-gqa"])
def test_llmrank_importances_and_rows_equal_the_golden_run(
    shared: pathlib.Path, name: str, scorer: str, chain: str
) -> None:
    check_ranks(shared, name, ranked(tiny(shared, name)), scorer, chain)


@pytest.mark.parametrize(
    ("name", "scorer", "chain", "scope"),
    [
        ("tiny-llama", "mpr-zT", "chained", "local"),
        ("tiny-llama-gqa", "wpr-g0.5", "isolated", "global"),
    ],
)
def test_llmrank_zeroes_the_rows_of_the_golden_run(
    shared: pathlib.Path, name: str, scorer: str, chain: str, scope: Any
) -> None:
    """Nothing else has changed, and the perplexity agrees."""
    r, want = tiny(shared, name), golden(shared, name, f"llmrank-{scorer}-{chain}")
    method = LLMRank(
        **RANKS[scorer], chain=CHAINS[chain], scope=scope, units="rows", variant="official"
    )
    model, _ = prune(r.model, method, r.calibration, Request(0.3), Runtime(batch=4))
    removed = by_block(
        bits(want[f"pruned_rows:{scope}0.3"], (len(want["importance"]),)),
        ranked(r).stats,
        ("a_up", "a_down"),
    )
    for new, old, (up, down) in zip(model.blocks, r.model.blocks, removed, strict=True):
        assert np.array_equal(new.up.w, np.where(up[:, None], 0, old.up.w))
        assert np.array_equal(new.down.w, np.where(down[:, None], 0, old.down.w))
        assert new.gate is old.gate
    assert_perplexity(r, model, want[f"window_ce:{scope}0.3"])


@pytest.fixture(scope="module")
def smollm2_ranked(shared: pathlib.Path, smollm2: pathlib.Path) -> Ranked:
    """Return the statistics of SmolLM2-135M that all scorers share: half a minute."""
    return ranked(load(smollm2, shared / "golden/tokens/smollm2"))


def test_llmrank_activations_of_smollm2_equal_the_golden_run(
    shared: pathlib.Path, smollm2_ranked: Ranked
) -> None:
    check_activations(shared, "smollm2", smollm2_ranked)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("scorer", RANKS)
def test_llmrank_importances_and_rows_of_smollm2_equal_the_golden_run(
    shared: pathlib.Path, smollm2_ranked: Ranked, scorer: str, chain: str
) -> None:
    check_ranks(shared, "smollm2", smollm2_ranked, scorer, chain)
