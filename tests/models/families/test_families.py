"""Every family equals transformers: logits, generated tokens, and the written pruned models."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.arch import (
    Arch,
    Block,
    Model,
    NonBlockParams,
    has_linear,
    linear_of,
    logits,
    with_linears,
)
from models.checkpoint.reader import abstract, in_memory, open_checkpoint
from models.checkpoint.spelling import with_dtype
from models.checkpoint.writer import Writer
from models.families import hf
from models.generate import generate
from models.layers import Linear
from models.surgery import cut, mask
from reference import torch_models
from reference.families import FAMILIES

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 24))
every_family = pytest.mark.parametrize("name", FAMILIES)
QUICK = ("phi", "gemma2", "mixtral")


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


def with_biases(block: Block, slots: tuple[str, ...]) -> Block:
    """Return the block with biases on some slots that have none."""
    linears = {}
    for slot in slots:
        # Experts have no biases in any class.
        linear = linear_of(block, slot) if has_linear(block, slot) else None
        if linear is not None and linear.b is None:
            linears[slot] = Linear(linear.w, jnp.linspace(-0.5, 0.5, linear.w.shape[0]))
    return with_linears(block, linears)


def cut_neurons(arch: Arch, block: Block, every: int) -> Block:
    """Cut one or two neurons of every 7, others in each expert; torch wants multiples of 4."""
    for k, group in enumerate(arch.groups_of(block, "neurons")):
        block = cut(block, group, np.roll(np.arange(56) % 7 > every, k))
    return block


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("ragged", [False, True], ids=["alike", "ragged, biased"])
def test_pruned_models_load_in_transformers(
    name: str, ragged: bool, tmp_path: pathlib.Path
) -> None:
    """Blocks lose heads and neurons, one block goes, readers get biases: the same logits."""
    torch_models.save_random(FAMILIES[name], tmp_path / "dense", scale=0.2)
    dense, kept = open_checkpoint(tmp_path / "dense"), (0, 2, 3)
    arch, blocks = dense.model.arch, []
    heads = dense.model.arch.config.kv_heads
    for i in kept:
        narrower = i == 2 or not ragged
        block = cut(dense.model.blocks[i], arch.group("heads"), np.arange(heads) != int(narrower))
        block = cut_neurons(arch, block, int(narrower))
        blocks.append(with_biases(block, ("o", "down")) if ragged else block)
    pruned = Model(arch, dense.model.non_block, tuple(blocks))
    writer = Writer(tmp_path / "out", dense.config)
    for i, block in enumerate(blocks):
        writer.put(i, block)
    writer.finish(dense.model.non_block, tmp_path / "dense", kept)
    ours, theirs = open_checkpoint(tmp_path / "out").model, torch_models.load(tmp_path / "out")
    expected = np.asarray(logits(pruned, TOKENS))
    np.testing.assert_allclose(np.asarray(logits(ours, TOKENS)), expected, atol=1e-5, rtol=1e-5)
    got = torch_models.logits(theirs, TOKENS)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_masked_units_compute_what_cut_ones_do(name: str) -> None:
    arch, non_block, specs = hf.specs(FAMILIES[name])
    draw = np.random.default_rng(1)
    non_block, blocks = jax.tree.map(
        lambda s: jnp.asarray(draw.normal(0.0, 0.2, s.shape), jnp.float32),
        (non_block, specs),
        is_leaf=hf.is_spec,
    )
    results = []
    for change in (mask, cut):
        block = change(blocks[0], arch.group("heads"), np.arange(arch.config.kv_heads) != 1)
        for group in arch.groups_of(block, "neurons"):
            block = change(block, group, np.arange(56) % 4 > 0)
        results.append(np.asarray(logits(Model(arch, non_block, (block, blocks[1])), TOKENS)))
    np.testing.assert_allclose(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_text_part_of_a_model_that_sees_images_is_read(tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {k: v for k, v in FAMILIES["gemma3"].items() if k != "model_type"}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    theirs = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    theirs.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["model_type"] == "gemma3_text"
    assert "multi_modal_projector, vision_tower was left out" in checkpoint.remarks[0]
    expected = torch_models.logits(theirs, TOKENS)
    got = np.asarray(logits(in_memory(checkpoint.model), TOKENS))
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


@every_family
def test_both_spellings_of_rotary_settings_are_written_and_agree(name: str) -> None:
    given = FAMILIES[name]
    for config in (given, {**given, "rope_parameters": {"rope_type": "default"}}):
        written = with_dtype(config, "float32")
        assert hf.specs(written)[0].config == hf.specs(config)[0].config
