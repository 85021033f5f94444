"""Blocks merged into the one before a cut, against a float64 port, and what must hold of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Model
from models.errors import InputError
from models.layers import Linear
from models.merging import why_not_mergeable
from models.sharding import make_mesh
from pruning.structured import flatten_core as core
from pruning.structured.depth_repair_core import add_cut_stats, begin_cut_stats
from pruning.structured.sleb import Sleb
from pruning.types import Outcome, Request, prune
from reference import flatten as port
from reference import small
from reference.sleb import TOKENS, deep, loss

ADD, POWER, LEVERAGE, WITHOUT = map(
    jax.jit, (add_cut_stats, core.channel_power, core.leverage, core.without_channels)
)
MERGEABLE = [f for f in small.EVERY_FAMILY if not why_not_mergeable(small.model(f).arch)]


def run(m: Model, remove: Any, **more: Any) -> tuple[Model, Outcome]:
    method = Sleb(remove=remove, repair="flatten")
    return prune(m, method, TOKENS, Request(0.0), Runtime(batch=3, **more))


def assert_close(got: Any, want: Any, tolerance: float = 1e-3) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_scores_agree_with_float64_ports() -> None:
    rng = np.random.default_rng(0)
    h, target = rng.normal(0.3, 1, (60, 12)), rng.normal(0, 2, (60, 5))
    o = Linear(jnp.asarray(rng.normal(size=(5, 12)), jnp.float32))
    windows = (jnp.float32(a).reshape(3, 20, -1) for a in (h, np.zeros((60, 5)), target))
    stats = ADD(begin_cut_stats(12, 5), *windows)
    got = np.asarray(POWER(stats, o)).reshape(-1, 4).sum(axis=1)
    np.testing.assert_allclose(got, port.head_scores(h, target, o, 4), rtol=1e-5)
    want = port.leverage(port.weighted_gram(h, target))
    np.testing.assert_allclose(LEVERAGE(stats.gram), want, rtol=1e-4)


def test_sums_without_channels_are_those_of_the_narrow_linear() -> None:
    rng, scale = np.random.default_rng(1), 0.5
    h, x, target = (jnp.float32(rng.normal(0.3, 1, (3, 20, n))) for n in (12, 5, 5))
    w, kept = jnp.float32(rng.normal(size=(5, 12))), np.array([0, 3, 4, 10], np.int32)

    def sums(channels: np.ndarray) -> Any:
        y = x + scale * h[..., channels] @ w[:, channels].T
        return ADD(begin_cut_stats(len(channels), 5), h[..., channels], y, target)

    got = WITHOUT(sums(np.arange(12)), Linear(w), kept, np.float32(scale))
    assert_close(got, sums(kept), 1e-4)


def check_against_port(m: Model, remove: tuple[int, ...], start: int, tokens: np.ndarray) -> None:
    method = Sleb(remove=remove, repair="flatten")
    pruned, outcome = prune(m, method, tokens, Request(0.0), Runtime(batch=3))
    block, errors = port.flatten(m, start, remove, tokens)
    assert_close(pruned.blocks[start], block, 2e-3)
    (figures,) = outcome.details["cuts"]
    assert figures["behind"] == start and figures["merged"] == list(remove)
    np.testing.assert_allclose(figures["error"], errors, rtol=1e-3)
    kept = [i for i in range(len(m.blocks)) if i not in remove]
    assert outcome.kept_blocks == tuple(kept)
    others = [(p, m.blocks[i]) for p, i in zip(pruned.blocks, kept, strict=True) if i != start]
    assert all(small.same(p, q) for p, q in others)
    assert jax.tree.map(jnp.shape, pruned.blocks[start]) == jax.tree.map(jnp.shape, m.blocks[start])


def test_a_run_of_removed_blocks_agrees_with_the_float64_port() -> None:
    check_against_port(deep("llama-gqa", 4), (2, 3), 1, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in MERGEABLE if f != "smollm3"])
def test_every_mergeable_family_agrees_with_the_float64_port(family: str) -> None:
    check_against_port(small.model(family), (1,), 0, small.tokens())


@pytest.mark.slow
def test_merging_loses_less_than_removing() -> None:
    m = deep("llama")
    (merged, outcome), (plain, _) = (
        run(m, (2, 5, 3)),
        prune(m, Sleb(remove=(2, 5, 3), repair="none"), TOKENS, Request(0.0), Runtime(batch=2)),
    )
    assert loss(m, merged.blocks) < loss(m, plain.blocks)
    assert [c["merged"] for c in outcome.details["cuts"]] == [[2, 3], [5]]
    assert all(sum(c["heads_from"]) == 4 for c in outcome.details["cuts"])


def test_a_block_that_does_nothing_leaves_the_one_before_it() -> None:
    m = deep("llama-gqa", 4)
    quiet = m.blocks[2].replace(
        o=jax.tree.map(jnp.zeros_like, m.blocks[2].o),
        down=jax.tree.map(jnp.zeros_like, m.blocks[2].down),
        up=jax.tree.map(jnp.zeros_like, m.blocks[2].up),
    )
    m = m._replace(blocks=(*m.blocks[:2], quiet, m.blocks[3]))
    pruned, outcome = run(m, [2])
    (figures,) = outcome.details["cuts"]
    assert outcome.figures[-1].rows[0][:3] == ["1, 2", "2, 0", "24, 0"]
    assert figures["heads_from"] == [2, 0] and figures["neurons_from"] == [24, 0]
    np.testing.assert_allclose(
        small.logits(pruned, TOKENS), small.logits(m, TOKENS), rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_a_block_of_other_positions_is_made_up_for_by_the_refit() -> None:
    """In this model the third block has no rotary positions."""
    m = _without_positions(deep("llama", 4), 2)
    pruned, outcome = run(m, [2])
    fitted, other = prune(m, Sleb(remove=[2], repair="refit"), TOKENS, Request(0.0))
    assert outcome.details["cuts"][0]["merged"] == []
    assert_close(pruned.blocks, fitted.blocks, 1e-4)
    np.testing.assert_allclose(
        outcome.details["cuts"][0]["error"], other.details["cuts"][0]["error"], rtol=1e-4
    )


def _without_positions(m: Model, i: int) -> Model:
    rotary = tuple(j != i for j in range(len(m.blocks)))
    config = dataclasses.replace(m.arch.config, rotary=rotary)
    blocks = tuple(b.replace(rope=None) if j == i else b for j, b in enumerate(m.blocks))
    return Model(m.arch._replace(config=config), m.non_block, blocks)


@pytest.mark.slow
def test_bfloat16_stays_bfloat16() -> None:
    m = small.model("llama-gqa", dtype="bfloat16")
    pruned, _ = prune(m, Sleb(remove=[1], repair="flatten"), small.tokens(), Request(0.0))
    assert {x.dtype for x in jax.tree.leaves(pruned.blocks)} == {jnp.dtype("bfloat16")}


def test_blocks_removed_at_the_start_have_none_before_them() -> None:
    m = deep("llama-gqa", 4)
    pruned, outcome = run(m, [0, 2])
    assert [c["behind"] for c in outcome.details["cuts"]] == [1]
    assert small.same(pruned.blocks[1], m.blocks[3])


@pytest.mark.parametrize(
    ("family", "units", "message"),
    [
        ("gemma2", "blocks", "of sleb merges blocks, and here a norm follows each branch"),
        ("opt", "blocks", "of sleb merges blocks, and here layer norms"),
        ("llama", "sublayers", 'of sleb is for whole blocks: give units="blocks"'),
    ],
)
def test_what_cannot_be_merged_is_bad_input(family: str, units: Any, message: str) -> None:
    m = small.model(family)
    with pytest.raises(InputError, match=message):
        prune(m, Sleb(blocks=1, repair="flatten", units=units), small.tokens(), Request(0.0))


@pytest.mark.slow
def test_a_mesh_merges_the_same() -> None:
    m = deep("llama")
    one = run(m, (2, 5, 3))[0].blocks
    method = Sleb(remove=(2, 5, 3), repair="flatten")
    runtime = Runtime(batch=4, mesh=make_mesh("data=4,model=2"))
    assert_close(one, prune(m, method, TOKENS, Request(0.0), runtime)[0].blocks, 1e-3)
