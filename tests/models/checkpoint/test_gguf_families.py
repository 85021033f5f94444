"""GGUF files of every architecture give back the model that llama.cpp's converter was given."""

import pathlib
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

from models.arch import logits
from models.checkpoint.gguf import open_gguf
from models.checkpoint.gguf_writer_vocab import load_backend, vocab_metadata
from models.checkpoint.reader import open_checkpoint
from models.errors import InputError
from reference import gguf_files, tiny, tiny_tokenizer
from reference.families import FAMILIES


def _without(name: str, *fields: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in FAMILIES[name].items() if k not in fields} | changes


_YARN = FAMILIES["llama yarn"]["rope_parameters"]
_SCALED = FAMILIES["gemma3 scaled"]["rope_parameters"]
# Configurations that a file can hold: it has no lists of windows or rotary blocks, and llama.cpp
# has one activation for each architecture.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**tiny.BIASED, "max_position_embeddings": 64},
    "llama yarn": FAMILIES["llama yarn"],
    "qwen2 yarn": _without("qwen2 yarn", rope_parameters={**_YARN, "beta_fast": 8.0}),
    "qwen3": FAMILIES["qwen3"],
    "qwen3 biased": _without(
        "qwen3 biased, sliding, yarn, tied",
        "use_sliding_window",
        "max_window_layers",
        "sliding_window",
    ),
    "granite": FAMILIES["granite"],
    "smollm3": FAMILIES["smollm3"],
    "olmo2": FAMILIES["olmo2"],
    "olmo2 biased": FAMILIES["olmo2 biased, tied"],
    "phi": _without("phi", intermediate_size=192),
    "phi3": FAMILIES["phi3"],
    "phi3 longrope": FAMILIES["phi3 longrope, sliding"],
    "phi3 partial longrope": FAMILIES["phi3 partial longrope"],
    "gemma": FAMILIES["gemma"],
    "gemma biased": FAMILIES["gemma biased"],
    "gemma2": _without("gemma2", query_pre_attn_scalar=12),
    "gemma3": _without("gemma3", query_pre_attn_scalar=12, num_hidden_layers=7),
    "gemma3 scaled": _without(
        "gemma3 scaled",
        "layer_types",
        "attn_logit_softcapping",
        num_hidden_layers=7,
        query_pre_attn_scalar=8,
    ),
}
QUICK = ("granite", "smollm3", "phi", "phi3 longrope", "gemma3")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CONFIGS]
)
def test_a_converted_file_gives_the_same_logits(name: str, tmp_path: pathlib.Path) -> None:
    config = CONFIGS[name]
    model = tiny.random_model(config)
    path = gguf_files.write(tmp_path / "m.gguf", config, gguf_files.tensors(config, model))
    read = open_checkpoint(path)
    tokens = tiny.tokens()
    assert read.config["model_type"] == config["model_type"]
    np.testing.assert_allclose(logits(read.model, tokens), logits(model, tokens), atol=1e-5)


# llama.cpp has no biases and no tied head of OLMo 2, and no bias of `o` in Qwen3 and Gemma. It
# passes over Phi-3's windows, and over the factor that a checkpoint gives yarn.
OTHERWISE = ("qwen3 biased", "olmo2 biased", "gemma biased", "phi3 longrope")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in OTHERWISE])
def test_llama_cpp_reads_the_test_files_as_we_do(name: str, tmp_path: pathlib.Path) -> None:
    """The files of these tests are what llama.cpp takes such files to be."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    config = CONFIGS[name]
    model = tiny.random_model(config)
    tiny_tokenizer.write(tmp_path)
    vocab = vocab_metadata(tmp_path, load_backend(tmp_path), config)
    state = gguf_files.tensors(config, model)
    path = gguf_files.write(tmp_path / "m.gguf", config, state, **vocab)
    loaded = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    # Longer than longrope's original length, as what llama.cpp has room for is.
    tokens = tiny.tokens(batch=1)
    loaded.eval(tokens[0].tolist())
    theirs = np.array(loaded.scores[: tokens.shape[1]])
    np.testing.assert_allclose(theirs, logits(model, tokens)[0], atol=0.05, rtol=0.01)
    loaded.close()


def test_queries_keys_and_values_may_be_one_tensor(tmp_path: pathlib.Path) -> None:
    """The first converters of Phi-2 kept the three fused, as its first checkpoints did."""
    config = CONFIGS["phi"]
    state = gguf_files.tensors(config, tiny.random_model(config))
    apart = open_gguf(gguf_files.write(tmp_path / "apart.gguf", config, state))[1]
    for i in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blk.{i}.attn_{x}.{kind}") for x in "qkv"]
            state[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate(parts)
    path = gguf_files.write(tmp_path / "fused.gguf", config, state)
    fused = open_gguf(path)[1]
    assert dict(fused.shapes) == dict(apart.shapes)
    for name in apart.shapes:
        np.testing.assert_array_equal(fused.read(name), apart.read(name), err_msg=name)
    state["blk.0.attn_qkv.weight"] = state["blk.0.attn_qkv.weight"][:-8]
    with pytest.raises(InputError, match=r"attn_qkv\.weight has 136 rows, not 18 heads of 8"):
        open_gguf(gguf_files.write(tmp_path / "short.gguf", config, state))


def _read(tmp_path: pathlib.Path, name: str, **changes: Any) -> dict[str, Any]:
    config = FAMILIES[name]
    state = {"token_embd.weight": np.zeros((config["vocab_size"], 4), np.float32)}
    return open_gguf(gguf_files.write(tmp_path / "m.gguf", config, state, **changes))[0]


def test_the_scale_of_gemmas_attention_follows_from_the_number_of_blocks(
    tmp_path: pathlib.Path,
) -> None:
    """llama.cpp has no setting for it: the largest models divide the width by the heads."""
    for name, blocks in (("gemma2", 46), ("gemma3", 62)):
        assert _read(tmp_path, name, block_count=blocks)["query_pre_attn_scalar"] == 48 // 6
        assert _read(tmp_path, name, block_count=blocks - 1)["query_pre_attn_scalar"] == 12


def test_windows_follow_the_architectures_rule_or_the_files_list(tmp_path: pathlib.Path) -> None:
    full, sliding = "full_attention", "sliding_attention"
    pattern = "attention.sliding_window_pattern"
    assert _read(tmp_path, "gemma2")["layer_types"] == [sliding, full] * 2
    assert _read(tmp_path, "gemma2", **{pattern: 3})["layer_types"] == [
        sliding, sliding, full, sliding,
    ]  # fmt: skip
    listed = _read(tmp_path, "gemma3", **{pattern: [False, True, True, False]})
    assert listed["layer_types"] == [full, sliding, sliding, full]
    assert _read(tmp_path, "gemma2", **{"attention.sliding_window": None})["sliding_window"] == 4096
    assert _read(tmp_path, "gemma3", **{"attention.sliding_window": None})["layer_types"] == (
        [full] * 4
    )
    with pytest.raises(InputError, match="pattern of sliding windows is not one of 4 blocks"):
        _read(tmp_path, "gemma3", **{pattern: [True]})
    with pytest.raises(InputError, match="sliding windows are not read from GGUF for olmo2"):
        _read(tmp_path, "olmo2", **{"attention.sliding_window": 7})


def test_settings_that_a_file_leaves_out_are_llama_cpps(tmp_path: pathlib.Path) -> None:
    absent = dict.fromkeys(("attention.scale", "embedding_scale", "residual_scale", "logit_scale"))
    granite = _read(tmp_path, "granite", **absent)
    assert granite["attention_multiplier"] == 8**-0.5
    ones = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    assert [granite[name] for name in ones] == [1.0] * 3
    absent = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"))
    gemma2 = _read(tmp_path, "gemma2", **absent)
    assert (gemma2["attn_logit_softcapping"], gemma2["final_logit_softcapping"]) == (50.0, 30.0)
    assert _read(tmp_path, "gemma3")["final_logit_softcapping"] is None


def test_a_factor_on_top_of_yarns_own_is_multiplied(tmp_path: pathlib.Path) -> None:
    rope = _read(tmp_path, "llama yarn", **{"rope.scaling.attn_factor": 2.0})["rope_parameters"]
    assert rope["attention_factor"] == pytest.approx(2 * (0.1 * np.log(4) + 1))
