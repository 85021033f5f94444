"""Tiny configurations of every family, as a `config.json` has them, and random parameters in which nothing is zero or one."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import hf
from models.arch import Model

VOCAB, LENGTH = 96, 24
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

LLAMA = {"model_type": "llama", "intermediate_size": 40, "max_position_embeddings": 64, **_SIZES, **_TOKENS}
GQA = {**LLAMA, "num_key_value_heads": 2}
BIASED = {**GQA, "attention_bias": True, "mlp_bias": True}
MISTRAL = {**GQA, "model_type": "mistral", "sliding_window": 7}
QWEN2 = {**GQA, "model_type": "qwen2"}
OPT = {"model_type": "opt", "ffn_dim": 40, "max_position_embeddings": 64, **_SIZES, **_TOKENS}
OPT_350M = {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}
FAMILIES = {"llama": LLAMA, "gqa": GQA, "biased": BIASED, "opt": OPT}


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Random tokens, int32 [batch length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length), dtype=np.int32)


def random_model(config: Mapping[str, Any], seed: int = 0) -> Model:
    """A model whose biases and norms are random too, so that a test sees them; weights large enough that every block matters."""
    rng = np.random.default_rng(seed)

    def draw(spec: hf.Spec) -> jax.Array:
        return jnp.asarray((spec.init == "ones") + 0.2 * rng.standard_normal(spec.shape), jnp.float32)

    arch, ends, blocks = hf.specs(config)
    return Model(arch, *jax.tree.map(draw, (ends, blocks), is_leaf=hf.is_spec))
