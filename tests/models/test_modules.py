"""The linen module computes the same as the pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.arch import logits
from models.init import init_model
from models.modules import CausalLM, variables

LLAMA = dict(
    model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=64, attention_bias=True,
    tie_word_embeddings=False,
)  # fmt: skip
OPT = dict(
    model_type="opt", hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
    word_embed_proj_dim=16, vocab_size=64, max_position_embeddings=32,
)  # fmt: skip


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_apply_equals_logits(config: dict) -> None:
    model = init_model(config, jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6)
    module = CausalLM(config)
    np.testing.assert_array_equal(module.apply(variables(model), tokens), logits(model, tokens))


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_init_has_the_shapes_of_the_checkpoint(config: dict) -> None:
    module, tokens = CausalLM(config), jnp.zeros((1, 4), jnp.int32)
    made = module.init(jax.random.key(1), tokens)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(
        jnp.shape, variables(init_model(config, jax.random.key(0)))
    )
    assert "blocks_1" in module.tabulate(jax.random.key(0), tokens)
    np.testing.assert_allclose(np.std(made["params"]["ends"]["embed"]), 0.02, rtol=0.1)
