"""Two merged blocks add to the stream what each adds on its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import Linear
from models.merging import can_merge, merge, why_not_mergeable
from pruning.structured.sleb_runner import silenced
from reference import flatten as port
from reference import small

MERGEABLE = [f for f in small.EVERY_FAMILY if not why_not_mergeable(small.model(f).arch)]


def stream(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 2, (3, 12, 16)), jnp.float32)


def parallel(m: Any, a: Any, b: Any, x: jax.Array) -> np.ndarray:
    """Both attention parts on x, then both feed-forward parts on the sum, each block run alone."""
    scale = m.arch.branch_scale
    x = np.asarray(x, np.float64)
    after = x + scale * sum(small.run_block(m, p, jnp.float32(x))[1]["o"] for p in (a, b))
    quiet = [silenced(p, ("o",)) for p in (a, b)]
    added = [small.run_block(m, p, jnp.float32(after))[1]["down"] for p in quiet]
    return after + scale * sum(added)


def with_biases(block: Any) -> Any:
    rng = np.random.default_rng(5)

    def biased(p: Linear) -> Linear:
        return Linear(p.w, jnp.asarray(rng.normal(size=len(p.w)), jnp.float32))

    return block.replace(**{n: biased(getattr(block, n)) for n in ("q", "v", "o", "down")})


@pytest.mark.parametrize(
    "family", ["llama-gqa", *(pytest.param(f, marks=pytest.mark.slow) for f in MERGEABLE)]
)
@pytest.mark.parametrize("biases", [False, True])
def test_a_merged_block_is_the_parallel_sum_of_both(family: str, biases: bool) -> None:
    """Rotary positions, grouped queries, gains and biases included; only the second has biases."""
    m = small.model(family)
    a, b = m.blocks[0], with_biases(m.blocks[1]) if biases else m.blocks[1]
    b = b.replace(window=a.window, rope=a.rope)
    x = stream()
    got = m.arch.block(merge(m.arch, a, b), x)[0]
    np.testing.assert_allclose(got, parallel(m, a, b, x), rtol=1e-4, atol=1e-4)


def test_merging_agrees_with_the_port() -> None:
    m = small.model("llama-gqa")
    got, want = merge(m.arch, *m.blocks[:2]), port.merge(*m.blocks[:2])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_families_whose_blocks_cannot_be_merged() -> None:
    refused = {f: why_not_mergeable(small.model(f).arch) for f in small.EVERY_FAMILY}
    starts = {
        "opt": "layer norms",
        "phi": "layer norms",
        "qwen3": "queries and keys have norms",
        "gemma2": "a norm follows each branch",
        "gemma3": "a norm follows each branch",
        "olmo2": "a norm follows each branch",
        "mixtral": "a router chooses",
        "qwen3_moe": "queries and keys have norms",
        "olmoe": "queries and keys have norms",
    }
    assert set(refused) - set(MERGEABLE) == set(starts)
    assert all(refused[f].startswith(start) for f, start in starts.items())


def test_blocks_of_other_positions_are_not_merged() -> None:
    """SmolLM3 leaves rotary positions out in every fourth block."""
    arch = small.model("llama").arch
    config = arch.config
    windows = arch._replace(config=dataclasses.replace(config, windows=(None, 5, None)))
    rotary = arch._replace(config=dataclasses.replace(config, rotary=(True, True, False)))
    assert can_merge(arch, 0, 1) and can_merge(windows, 0, 2) and can_merge(rotary, 0, 1)
    assert not can_merge(windows, 0, 1) and not can_merge(rotary, 1, 2)
