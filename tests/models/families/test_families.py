"""Every family equals transformers: logits, generated tokens, and the written pruned models."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.arch import Block, Model, NonBlockParams, logits
from models.checkpoint.reader import abstract, in_memory, open_checkpoint
from models.families import hf
from models.generate import generate
from reference import torch_models
from reference.families import FAMILIES

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 24))
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_shapes_alone_give_logits(name: str) -> None:
    model = abstract(*hf.specs(FAMILIES[name]), jnp.bfloat16)

    def run(non_block: NonBlockParams, blocks: tuple[Block, ...], tokens: jax.Array) -> jax.Array:
        return logits(Model(model.arch, non_block, blocks), tokens)

    tokens = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
    out = jax.eval_shape(run, model.non_block, model.blocks, tokens)
    assert (out.shape, out.dtype) == ((2, 24, 96), jnp.float32)


@pytest.mark.slow
@every_family
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: pathlib.Path) -> None:
    torch_models.save_random(FAMILIES[name], tmp_path, scale=0.2)
    model, theirs = in_memory(open_checkpoint(tmp_path).model), torch_models.load(tmp_path)
    for length in (24, 9):  # longer and shorter than what longrope was made for
        tokens = TOKENS[:, :length]
        expected = torch_models.logits(theirs, tokens)
        np.testing.assert_allclose(
            np.asarray(logits(model, tokens)), expected, atol=1e-4, rtol=1e-4
        )
        np.testing.assert_array_equal(
            generate(model, tokens, 32), torch_models.greedy(theirs, tokens, 32)
        )
