"""Bounds of the loss against the softmax in float64, for all sizes of vocabularies and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.arch import Model, logits
from pruning.structured.sleb_core import PARTS, add_part, chosen_logits, narrow_head
from reference import small, tiny

TOKENS = small.tokens(3, 10)
MODELS = ["llama", "llama-gqa", "opt", "untied", "projected"]


def model(name: str, vocab: int) -> Model:
    """Return a random model with this kind of head."""
    configs = {
        **small.CONFIGS,
        "untied": small.CONFIGS["llama"] | {"tie_word_embeddings": False},
        "projected": tiny.OPT_350M,
    }
    return tiny.random_model(configs[name] | {"vocab_size": vocab})


def bounds(m: Model, tokens: np.ndarray) -> np.ndarray:
    """Return every bound of every window [PARTS b]."""
    x = m.arch.embed(m.non_block, tokens)
    for block in m.blocks:
        x, _ = m.arch.block(block, x)
    step = jax.jit(add_part, static_argnums=0)
    chosen = jax.jit(chosen_logits, static_argnums=0)(m.arch.head, m.non_block, x, tokens)
    sums = chosen
    rows = []
    for part in range(PARTS):
        sums, bound = step(m.arch.head, m.non_block, x, tokens, chosen, sums, np.int32(part))
        rows.append(np.asarray(bound))
    return np.array(rows)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("vocab", [small.VOCAB, 5, 16, 100])
def test_bounds_rise_to_the_cross_entropy(name: str, vocab: int) -> None:
    m, tokens = model(name, vocab), TOKENS % vocab
    rising = bounds(m, tokens)
    z = np.asarray(logits(m, jnp.asarray(tokens)), np.float64)[:, :-1]
    picked = np.take_along_axis(z, tokens[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(
        rising[-1], (np.log(np.exp(z).sum(axis=-1)) - picked).mean(axis=1), rtol=1e-5
    )
    assert np.all(rising >= 0) and np.all(np.diff(rising, axis=0) >= 0)
    size = -(-vocab // PARTS)
    for part in range(PARTS):  # each is the sum over the tokens so far, and the next one itself
        seen = np.exp(z[..., : (part + 1) * size]).sum(axis=-1) + np.where(
            tokens[:, 1:] < (part + 1) * size, 0, np.exp(picked)
        )
        np.testing.assert_allclose(
            rising[part], (np.log(seen) - picked).mean(axis=1), rtol=1e-4, atol=1e-6
        )


def test_bounds_never_fall_by_a_bit() -> None:
    """Where later parts add next to nothing, rounding decides: logits of every size."""
    m = model("untied", 4096)
    scale = jnp.asarray(np.random.default_rng(0).uniform(0, 300, (4096, 1)), jnp.float32)
    m = m._replace(
        non_block=m.non_block.replace(head=m.non_block.head.replace(w=m.non_block.head.w * scale))
    )
    rising = bounds(m, np.random.default_rng(1).integers(0, 4096, (4, 64)).astype(np.int32))
    assert (
        np.all(np.diff(rising, axis=0) >= 0)
        and np.any(np.diff(rising, axis=0) == 0)
        and np.all(np.isfinite(rising))
    )


def test_a_model_that_overflows_has_no_finite_bound() -> None:
    m = model("llama", small.VOCAB)
    broken = m._replace(
        non_block=m.non_block.replace(norm=jax.tree.map(lambda x: x * jnp.nan, m.non_block.norm))
    )
    assert np.all(np.isnan(bounds(broken, TOKENS)))


def test_a_narrow_head_gives_a_slice_of_the_logits() -> None:
    for name in MODELS:
        m = model(name, 40)
        x = jnp.asarray(
            np.random.default_rng(2).standard_normal(
                (2, 5, m.arch.embed(m.non_block, TOKENS % 40).shape[-1])
            ),
            jnp.float32,
        )
        got = m.arch.head(narrow_head(m.non_block, jnp.int32(7), 9), x)
        np.testing.assert_allclose(
            got, m.arch.head(m.non_block, x)[..., 7:16], rtol=1e-5, atol=1e-6
        )
