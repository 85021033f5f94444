"""Initial parameters: the standard deviations, ones and zeros that training starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.init import init_model
from reference import tiny

# Wide enough to measure a deviation, and all one shape, because JAX compiles its generator for
# every new one.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "vocab_size": 128,
    "max_position_embeddings": 126,
    "num_hidden_layers": 4,
}
LLAMA = {**tiny.LLAMA, "attention_bias": True, "mlp_bias": True, **SIZES}
OPT = {**tiny.OPT_350M, **SIZES}


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_weights_have_the_scale_of_their_configuration(config: dict[str, object]) -> None:
    std = "init_std" if config["model_type"] == "opt" else "initializer_range"
    model = init_model({**config, std: 0.05}, jax.random.key(0))
    last = {"o", "down", "fc2"}
    for block in model.blocks:
        for slot in model.arch.slots:
            p = getattr(block, slot.name)
            expected = 0.05 / np.sqrt(2 * 4) if slot.name in last else 0.05
            assert np.std(p.w) == pytest.approx(expected, rel=0.05), slot.name
            assert abs(np.mean(p.w)) < 3 * expected / np.sqrt(p.w.size)
            assert not np.any(p.b)
        np.testing.assert_array_equal(block.mlp_norm.scale, 1)
    assert np.std(model.non_block.embed) == pytest.approx(0.05, rel=0.05)
    if model.non_block.norm is None:
        assert np.std(model.non_block.project_out.w) == pytest.approx(0.05, rel=0.05)


def test_default_scale_and_dtype_hold_and_a_seed_repeats() -> None:
    model = init_model(LLAMA, jax.random.key(0), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves((model.non_block, model.blocks))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert np.std(np.asarray(model.non_block.embed, np.float32)) == pytest.approx(0.02, rel=0.05)
    again, other = (init_model(LLAMA, jax.random.key(seed), jnp.bfloat16) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, again.blocks, model.blocks)
    assert np.any(other.blocks[0].q.w != model.blocks[0].q.w)
    assert np.any(model.blocks[0].q.w != model.blocks[1].q.w)
