"""Tiny configurations of every family, and random parameters of which none is zero or one."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models.arch import Model
from models.checkpoint.output_format import Form, Layout
from models.checkpoint.writer import SHARD_BYTES, Writer
from models.families import hf

VOCAB, LENGTH = 96, 24
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

LLAMA = {
    "model_type": "llama",
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    **_SIZES,
    **_TOKENS,
}
GQA = {**LLAMA, "num_key_value_heads": 2}
BIASED = {**GQA, "attention_bias": True, "mlp_bias": True}
MISTRAL = {**GQA, "model_type": "mistral", "sliding_window": 7}
QWEN2 = {**GQA, "model_type": "qwen2"}
OPT = {"model_type": "opt", "ffn_dim": 40, "max_position_embeddings": 64, **_SIZES, **_TOKENS}
OPT_350M = {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}
SHORT = {
    **GQA,
    "max_position_embeddings": 16,
}  # shorter than the text: where dynamic scaling begins
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {"llama": LLAMA, "gqa": GQA, "biased": BIASED, "opt": OPT}
EVERY = {**FAMILIES, "qwen2": QWEN2, "opt-350m": OPT_350M}


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Return random tokens, int32 [batch length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length), dtype=np.int32)


def random_model(config: Mapping[str, Any], seed: int = 0) -> Model:
    """Return a model whose biases and norms are random too, so that a test notices them.

    Weights are large enough that every block matters.
    """
    rng = np.random.default_rng(seed)

    def draw(spec: hf.Spec) -> jax.Array:
        return jnp.asarray(
            (spec.init == "ones") + 0.2 * rng.standard_normal(spec.shape), jnp.float32
        )

    arch, non_block, blocks = hf.specs(config)
    return Model(arch, *jax.tree.map(draw, (non_block, blocks), is_leaf=hf.is_spec))


def state_of(config: Mapping[str, Any], model: Model) -> dict[str, np.ndarray]:
    """Return the model's arrays under their checkpoint names."""
    names = jax.tree.leaves(hf.specs(config)[1:], is_leaf=hf.is_spec)
    return {
        s.name: np.asarray(x)
        for s, x in zip(names, jax.tree.leaves((model.non_block, tuple(model.blocks))), strict=True)
    }


def write(
    directory: pathlib.Path, state: Mapping[str, np.ndarray], config: Mapping[str, Any] = GQA
) -> pathlib.Path:
    """Write a checkpoint of one safetensors file, without the project's own writer."""
    directory.mkdir(exist_ok=True)
    save_file(
        {n: np.ascontiguousarray(v) for n, v in state.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def written(
    directory: pathlib.Path,
    model: Model,
    config: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    layout: Layout = "auto",
) -> tuple[Writer, Form]:
    """Write the model with our writer, without companions."""
    companions = directory.parent / "companions"
    companions.mkdir(exist_ok=True)
    writer = Writer(directory, config, layout, shard_bytes)
    for i, block in enumerate(model.blocks):
        writer.put(i, block)
    return writer, writer.finish(model.non_block, companions)


def assert_equal(got: Model, expected: Model) -> None:
    """Assert that both models have the same architecture and equal bits."""
    assert got.arch is expected.arch
    jax.tree.map(
        np.testing.assert_array_equal,
        (got.non_block, tuple(got.blocks)),
        (expected.non_block, tuple(expected.blocks)),
    )
