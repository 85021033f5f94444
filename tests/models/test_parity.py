"""Logits equal `transformers`' for every configuration, from checkpoints that it wrote."""

import json
import pathlib

import numpy as np
import pytest

from models.arch import Model, apply_block, embed, logits
from models.checkpoint.reader import open_checkpoint
from models.families import hf
from reference import tiny, torch_models

pytestmark = pytest.mark.slow

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": tiny.LLAMA3,
}
THETA = 500.0

CONFIGS = {
    "llama": tiny.LLAMA,
    "llama tied": {**tiny.LLAMA, "tie_word_embeddings": True},
    "llama grouped": tiny.GQA,
    "llama one key-value head": {**tiny.LLAMA, "num_key_value_heads": 1},
    "llama attention bias": {**tiny.GQA, "attention_bias": True},
    "llama mlp bias": {**tiny.GQA, "mlp_bias": True},
    "llama wide heads": {**tiny.GQA, "head_dim": 16},
    "llama eps and gelu": {**tiny.GQA, "rms_norm_eps": 0.1, "hidden_act": "gelu"},
    "mistral windowed": tiny.MISTRAL,
    "mistral full": {**tiny.MISTRAL, "sliding_window": None, "head_dim": 16},
    "qwen2": tiny.QWEN2,
    "qwen2 tied, window unused": {**tiny.QWEN2, "tie_word_embeddings": True, "sliding_window": 5},
    "qwen2 windowed from block 1": {
        **tiny.QWEN2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2 layer types": {
        **tiny.QWEN2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": tiny.OPT,
    "opt untied gelu": {**tiny.OPT, "tie_word_embeddings": False, "activation_function": "gelu"},
    "opt 350m": tiny.OPT_350M,
    "opt pre-norm projected": {**tiny.OPT, "word_embed_proj_dim": 16},
    "opt post-norm": {**tiny.OPT, "do_layer_norm_before": False},
    "opt no final norm": {**tiny.OPT, "_remove_final_layer_norm": True},
    "opt no biases": {**tiny.OPT, "enable_bias": False},
    "opt plain norms": {**tiny.OPT, "layer_norm_elementwise_affine": False},
    **{
        f"rope {kind}, old spelling": {**tiny.SHORT, "rope_theta": THETA, "rope_scaling": s}
        for kind, s in SCALINGS.items()
    },
    **{
        f"rope {kind}, new spelling": {**tiny.SHORT, "rope_parameters": {"rope_theta": THETA, **s}}
        for kind, s in SCALINGS.items()
    },
    "rope linear, oldest spelling": {
        **tiny.SHORT,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "rope plain": {**tiny.SHORT, "rope_theta": THETA},
}


def assert_same_logits(model: Model, directory: pathlib.Path, tokens: np.ndarray) -> None:
    expected = torch_models.logits(torch_models.load(directory), tokens)
    np.testing.assert_allclose(np.asarray(logits(model, tokens)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_every_configuration_equal_transformers(
    name: str, tmp_path: pathlib.Path
) -> None:
    """The checkpoint's config.json and the older hand-written one give the same architecture."""
    torch_models.save_random(CONFIGS[name], tmp_path)
    model = open_checkpoint(tmp_path).model
    assert_same_logits(model, tmp_path, tiny.tokens())
    assert hf.specs(CONFIGS[name])[0] is model.arch


def test_dynamic_scaling_leaves_short_texts_alone(tmp_path: pathlib.Path) -> None:
    torch_models.save_random(CONFIGS["rope dynamic, old spelling"], tmp_path)
    model, tokens = open_checkpoint(tmp_path).model, tiny.tokens(length=12)
    assert_same_logits(model, tmp_path, tokens)
    unscaled = hf.specs({**tiny.SHORT, "rope_theta": THETA})[0]
    np.testing.assert_array_equal(
        logits(model, tokens), logits(model._replace(arch=unscaled), tokens)
    )


def test_every_setting_shows_in_the_logits(tmp_path: pathlib.Path) -> None:
    """Parity proves nothing where a setting does nothing: each of these must change the logits."""
    torch_models.save_random(tiny.SHORT, tmp_path)
    model, tokens = open_checkpoint(tmp_path).model, tiny.tokens()
    seen = [logits(model, tokens)]
    settings = [{"rope_scaling": s, "rope_theta": THETA} for s in SCALINGS.values()]
    for change in [
        *settings,
        {"rms_norm_eps": 0.1},
        {"hidden_act": "gelu"},
        {"model_type": "mistral", "sliding_window": 7},
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**tiny.SHORT, **change}))
        seen.append(logits(open_checkpoint(tmp_path).model, tokens))
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert np.abs(a - b).max() > 1e-2


def assert_same_block_by_block(directory: pathlib.Path, tokens: np.ndarray) -> None:
    """Through the compiled parts that evaluation and pruning use."""
    arch, non_block, blocks = open_checkpoint(directory).model
    x = embed(arch, non_block, tokens)
    for i in range(len(blocks)):
        x = apply_block(arch, blocks[i], x)
    expected = torch_models.logits(torch_models.load(directory), tokens)
    np.testing.assert_allclose(np.asarray(arch.head(non_block, x)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["stories260K", "tiny-llama", "tiny-llama-gqa", "tiny-opt"])
def test_logits_of_trained_models_equal_transformers(name: str, shared: pathlib.Path) -> None:
    tokens = np.load(shared / "golden" / "tokens" / "tiny_eval.npy")[:1, :64] % 512
    assert_same_block_by_block(shared / "models" / name, tokens)


def test_logits_of_smollm2_equal_transformers(smollm2: pathlib.Path, shared: pathlib.Path) -> None:
    tokens = np.load(shared / "golden" / "tokens" / "smollm2_eval.npy")[:1, :32]
    assert_same_block_by_block(smollm2, tokens)
