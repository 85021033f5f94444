"""`mask` and `cut` are the same function of the input, and touch what they say and nothing else."""

from typing import Any

import jax
import numpy as np
import pytest

from models.arch import Block, Model, logits
from models.families import hf
from models.layers import Linear
from models.surgery import cut, mask, units, zero_rows
from reference import tiny


def random_keeps(model: Model, group: str, seed: int = 3) -> list[np.ndarray]:
    """Another set of units in every block, some kept and some not."""
    rng = np.random.default_rng(seed)
    keeps = []
    for i, block in enumerate(model.blocks):
        keep = rng.random(units(block, model.arch.group(group))) < 0.5
        keep[i], keep[i - 1] = True, False
        keeps.append(keep)
    return keeps


@pytest.mark.parametrize("group", ["heads", "neurons"])
@pytest.mark.parametrize("name", tiny.EVERY)
def test_mask_and_cut_give_the_same_logits(name: str, group: str) -> None:
    model, tokens = tiny.random_model(tiny.EVERY[name]), tiny.tokens()
    g, keeps = model.arch.group(group), random_keeps(model, group)
    masked = model._replace(
        blocks=tuple(mask(b, g, k) for b, k in zip(model.blocks, keeps, strict=True))
    )
    smaller = model._replace(
        blocks=tuple(cut(b, g, k) for b, k in zip(model.blocks, keeps, strict=True))
    )
    expected = np.asarray(logits(masked, tokens))
    np.testing.assert_allclose(
        logits(smaller, tokens), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )
    assert np.abs(expected - logits(model, tokens)).max() > 0.1
    assert [units(b, g) for b in smaller.blocks] == [k.sum() for k in keeps]
    assert jax.tree.map(np.shape, masked.blocks) == jax.tree.map(np.shape, model.blocks)


def rows_of(config: dict[str, Any], field: str, group: str, keep: np.ndarray) -> np.ndarray:
    """Return the entries of a linear's coupled axis that a unit owns, from the configuration."""
    heads = config["num_attention_heads"]
    size, kv = config["hidden_size"] // heads, config.get("num_key_value_heads", heads)
    return np.repeat(
        keep, 1 if group == "neurons" else size if field in "kv" else size * heads // kv
    )


MEMBERS = {
    ("gqa", "heads"): ("o", "qkv"),
    ("biased", "heads"): ("o", "qkv"),
    ("biased", "neurons"): ("down", ("gate", "up")),
    ("opt", "heads"): ("o", "qkv"),
    ("opt", "neurons"): ("fc2", ("fc1",)),
}


@pytest.mark.parametrize(("name", "group"), MEMBERS)
def test_cut_keeps_the_order_and_mask_the_places(name: str, group: str) -> None:
    config, (reader, writers) = tiny.FAMILIES[name], MEMBERS[name, group]
    model = tiny.random_model(config)
    block, g, keep = model.blocks[0], model.arch.group(group), random_keeps(model, group)[0]
    smaller, masked = cut(block, g, keep), mask(block, g, keep)
    for field in (slot.name for slot in model.arch.slots):
        dense, small, zeroed = (getattr(b, field) for b in (block, smaller, masked))
        at = rows_of(config, field, group, keep)
        if field == reader:
            np.testing.assert_array_equal(small.w, dense.w[:, at])
            np.testing.assert_array_equal(zeroed.w, np.asarray(dense.w) * at[None, :])
            assert small.b is dense.b and zeroed.b is dense.b
        elif field in writers:
            np.testing.assert_array_equal(small.w, dense.w[at])
            np.testing.assert_array_equal(zeroed.w, np.asarray(dense.w) * at[:, None])
            if dense.b is not None:
                np.testing.assert_array_equal(small.b, dense.b[at])
                np.testing.assert_array_equal(zeroed.b, np.asarray(dense.b) * at)
        else:
            assert small is dense and zeroed is dense
    assert smaller.attn_norm is block.attn_norm


@pytest.mark.parametrize("operation", [mask, cut])
def test_keeping_everything_changes_nothing(operation: Any) -> None:
    model = tiny.random_model(tiny.BIASED)
    for group in model.arch.groups:
        block = model.blocks[0]
        same = operation(block, group, np.ones(units(block, group), bool))
        jax.tree.map(np.testing.assert_array_equal, same, block)


def test_all_neurons_can_go() -> None:
    model, tokens = tiny.random_model(tiny.BIASED), tiny.tokens()
    g = model.arch.group("neurons")

    def without(operation: Any) -> jax.Array:
        blocks: list[Block] = [operation(b, g, np.zeros(units(b, g), bool)) for b in model.blocks]
        return logits(model._replace(blocks=tuple(blocks)), tokens)

    np.testing.assert_allclose(without(cut), without(mask), rtol=1e-5, atol=1e-5)


def test_zero_rows_clears_rows_and_biases_alone() -> None:
    w, b = np.ones((4, 3), np.float32), np.ones(4, np.float32)
    p = Linear(jax.numpy.asarray(w), jax.numpy.asarray(b))
    out = zero_rows(p, np.array([0, 3]))
    np.testing.assert_array_equal(out.w, w * np.array([0, 1, 1, 0])[:, None])
    np.testing.assert_array_equal(out.b, [0, 1, 1, 0])
    assert zero_rows(Linear(p.w), np.array([1])).b is None
    np.testing.assert_array_equal(p.w, w)


def test_units_are_key_value_groups() -> None:
    counts = {
        name: {g.name: units(tiny.random_model(c).blocks[0], g) for g in hf.specs(c)[0].groups}
        for name, c in tiny.FAMILIES.items()
    }
    assert counts["llama"] == counts["opt"] == {"heads": 4, "neurons": 40}
    assert counts["gqa"] == {"heads": 2, "neurons": 40}
