"""A GGUF file of a pruned model is the same function, in our reader and in llama.cpp."""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("gguf")

from models.arch import Model, logits
from models.checkpoint.gguf import gguf_tokenizer, gguf_tokenizer_config
from models.checkpoint.gguf_file import read_gguf
from models.checkpoint.gguf_writer import check_gguf, write_gguf
from models.checkpoint.reader import open_checkpoint
from models.errors import InputError
from models.surgery import cut
from reference import tiny, tiny_tokenizer

WIDE = {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8, "num_key_value_heads": 3}
LLAMA, QWEN2 = {**tiny.LLAMA, **WIDE}, {**tiny.QWEN2, **WIDE}
# Heads as long as real ones: of fewer angles the reader cannot recover LLaMA 3's scaling.
LLAMA3 = {**tiny.GQA, "head_dim": 64, "rope_scaling": tiny.LLAMA3, "rope_theta": 500000.0}
LINEAR = {**tiny.GQA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FOUR = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 1.5, 2.5, 4.0]}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 16, **FOUR}


def of(kind: str, **more: Any) -> dict[str, Any]:
    return {**LLAMA, "model_type": kind, "num_hidden_layers": 4, **more}


GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 5}
# Multipliers, as those of Granite's own models.
GRANITE = of(
    "granite",
    embedding_multiplier=3.0,
    attention_multiplier=0.2,
    residual_multiplier=0.4,
    logits_scaling=2.0,
)
PHI3 = of("phi3", original_max_position_embeddings=16, rope_scaling=LONGROPE)
FACTORS = {name: FOUR[name][:3] for name in FOUR}
PARTIAL = {**PHI3, "rope_scaling": {**LONGROPE, **FACTORS, "partial_rotary_factor": 0.75}}
# In the other families blocks are alike: narrower ones are filled with zeros.
FAMILIES: dict[str, tuple[Mapping[str, Any], list[int], list[int], tuple[str, ...], str]] = {
    "llama, yarn": ({**LLAMA, "rope_scaling": YARN}, [2, 2], [20, 20], (), "llama"),
    "llama, yarn of another factor": (
        {**LLAMA, "rope_scaling": {**YARN, "attention_factor": 1.3}}, [3, 3], [40, 40], (), "llama"
    ),
    "qwen3": (of("qwen3", rope_scaling=YARN), [2] * 4, [20] * 4, (), "qwen3"),
    "qwen3, ragged": (of("qwen3"), [1, 3, 2, 2], [20, 21, 40, 3], (), "qwen3"),
    "granite's own": (GRANITE, [2] * 4, [20] * 4, ("o", "down"), "granite"),
    "smollm3": (of("smollm3"), [2] * 4, [20] * 4, (), "smollm3"),
    "olmo2": (of("olmo2"), [3] * 4, [20] * 4, (), "olmo2"),
    "phi": (of("phi", num_key_value_heads=6), [6] * 4, [40] * 4, (), "phi2"),
    "phi3": (PHI3, [3] * 4, [20] * 4, (), "phi3"),
    "phi3, ragged": (PHI3, [2, 3, 1, 2], [20, 21, 40, 3], (), "deci"),
    "phi3, fewer heads": (PHI3, [2] * 4, [20] * 4, (), "llama"),
    "phi3, partial and ragged": (PARTIAL, [2, 3, 1, 2], [20, 21, 40, 3], (), "phi3"),
    "gemma": (of("gemma"), [2] * 4, [20] * 4, (), "gemma"),
    "gemma2": (of("gemma2", **GEMMA), [2] * 4, [20] * 4, (), "gemma2"),
    "gemma2, ragged": (of("gemma2", **GEMMA), [1, 3, 2, 2], [20, 21, 40, 3], (), "gemma2"),
    "gemma3": (of("gemma3_text", **GEMMA, num_hidden_layers=7), [2] * 7, [20] * 7, (), "gemma3"),
}  # fmt: skip
FORMS: dict[str, tuple[Mapping[str, Any], list[int], list[int], tuple[str, ...], str]] = {
    "llama": (LLAMA, [3, 3], [40, 40], (), "llama"),
    "tied": ({**LLAMA, "tie_word_embeddings": True}, [3, 3], [40, 40], (), "llama"),
    "heads that do not divide": ({**tiny.LLAMA, **WIDE, "num_key_value_heads": 6}, [5, 5],
                                 [20, 20], (), "llama"),
    "biases of some": (LLAMA, [3, 3], [40, 40], ("o", "down"), "llama"),
    "granite": ({**tiny.LLAMA, **WIDE, "num_key_value_heads": 6}, [5, 5], [20, 20],
                ("o", "down"), "llama"),
    "all biases": (tiny.BIASED, [2, 2], [40, 40], (), "llama"),
    "llama 3": (LLAMA3, [2, 2], [40, 40], (), "llama"),
    "linear": (LINEAR, [2, 2], [40, 40], (), "llama"),
    "qwen2": (QWEN2, [3, 3], [32, 32], (), "qwen2"),
    "qwen2 with another bias": (QWEN2, [3, 3], [32, 32], ("o",), "llama"),
    "qwen2 heads": (QWEN2, [1, 1], [20, 20], (), "llama"),
    "ragged": (LLAMA, [2, 3], [20, 21], (), "deci"),
    "ragged with biases": (LLAMA, [1, 3], [40, 21], ("o", "down"), "deci"),
    "ragged qwen2": (QWEN2, [1, 2], [20, 20], ("o",), "deci"),
    "no attention": (LLAMA, [2, 0], [20, 21], (), "deci"),
    "no attention at the start": (LLAMA, [0, 2], [20, 21], (), "deci"),
    "no attention but its bias": (LLAMA, [2, 0], [20, 21], ("o",), "deci"),
    "no feed-forward": (LLAMA, [2, 2], [0, 20], (), "deci"),
    "an empty block": (LLAMA, [2, 0], [20, 0], (), "llama"),
    **FAMILIES,
}  # fmt: skip


# One form of each difference between the two formats; every form compiles its own programs.
QUICK = (
    "granite", "llama 3", "qwen2", "ragged with biases", "no attention at the start",
    "llama, yarn", "phi3, partial and ragged", "gemma3",
)  # fmt: skip


def float16(model: Model) -> Model:
    """Round all matrices to float16, as a GGUF file does."""
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.float16).astype(jnp.float32) if x.ndim == 2 else x,
        (model.non_block, model.blocks),
    )
    return Model(model.arch, *rounded)


def pruned(
    config: Mapping[str, Any], heads: list[int], neurons: list[int], biases: tuple[str, ...]
) -> Model:
    """Return a random model with given units left; 0 leaves one of zeros, as all methods do."""
    model = tiny.random_model(config)
    rng, blocks = np.random.default_rng(1), []
    for block, *counts in zip(model.blocks, heads, neurons, strict=True):
        for name, count, reader in zip(("heads", "neurons"), counts, ("o", "down"), strict=True):
            group = model.arch.group(name)
            total = {"heads": len(block.k.w) // model.arch.config.head_dim, "neurons": 40}[name]
            block = cut(
                block, group, np.isin(np.arange(total), rng.permutation(total)[: count or 1])
            )
            if not count:
                linear = getattr(block, reader)
                block = block.replace(**{reader: linear.replace(w=jnp.zeros_like(linear.w))})
        for name in biases:
            linear = getattr(block, name)
            bias = jnp.asarray(rng.normal(size=len(linear.w)), jnp.float32)
            block = block.replace(**{name: linear.replace(b=bias)})
        blocks.append(block)
    return model._replace(blocks=tuple(blocks))


def written(directory: pathlib.Path, model: Model, config: Mapping[str, Any]) -> pathlib.Path:
    tiny.written(directory, model, config)
    tiny_tokenizer.write(directory)
    return directory


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, form in FORMS.items()
    ],
)
def test_our_reader_gives_the_same_logits(form: Any, tmp_path: pathlib.Path) -> None:
    config, heads, neurons, biases, architecture = form
    model = float16(pruned(config, heads, neurons, biases))
    directory = written(tmp_path / "out", model, config)
    file = write_gguf(directory)
    assert (file.architecture, file.path.name) == (architecture, "model-f16.gguf")
    assert file.size == file.path.stat().st_size and file.context == 64
    ours, theirs = open_checkpoint(directory).model, open_checkpoint(file.path).model
    tokens = tiny.tokens()
    # Zeros beside the units, and one added to Gemma's norms, change the last bits of float32.
    bound = 1e-5 if form in FAMILIES.values() else 0.0
    np.testing.assert_allclose(logits(theirs, tokens), logits(ours, tokens), atol=bound, rtol=bound)


def test_parts_that_do_nothing_are_not_stored(tmp_path: pathlib.Path) -> None:
    config, heads, neurons, biases, _ = FORMS["no attention"]
    directory = written(tmp_path / "a", pruned(config, heads, neurons, biases), config)
    file = read_gguf(write_gguf(directory).path)
    assert file.metadata["deci.attention.head_count"] == [4, 0]
    assert file.metadata["deci.attention.head_count_kv"] == [2, 0]
    assert not [n for n in file.tensors if n.startswith("blk.1.attn")]
    config, heads, neurons, biases, _ = FORMS["an empty block"]
    directory = written(tmp_path / "b", pruned(config, heads, neurons, biases), config)
    assert read_gguf(write_gguf(directory).path).metadata["llama.block_count"] == 1
    # A block without heads or neurons that still adds a bias does something.
    config, heads, neurons, biases, _ = FORMS["biases of some"]
    directory = written(tmp_path / "c", pruned(config, heads, neurons, biases), config)
    names = read_gguf(write_gguf(directory).path).tensors
    assert {n for n in names if n.endswith(".bias")} == {
        f"blk.{i}.{part}.bias" for i in range(2) for part in ("attn_output", "ffn_down")
    }


def test_q8_0_is_near(tmp_path: pathlib.Path) -> None:
    """Rows of whole blocks of 32 are quantised, others stay float16, zeros stay zero."""
    config = {**tiny.GQA, "hidden_size": 64, "head_dim": 8, "intermediate_size": 40}
    model = tiny.random_model(config)
    zeroed = model.blocks[0].up.w.at[::2].set(0)
    first = model.blocks[0].replace(up=model.blocks[0].up.replace(w=zeroed))
    model = model._replace(blocks=(first, *model.blocks[1:]))
    directory = written(tmp_path / "out", model, config)
    file = write_gguf(directory, "q8_0")
    stored = read_gguf(file.path).tensors
    assert stored["blk.0.attn_q.weight"].dtype == "Q8_0"
    assert stored["blk.0.ffn_down.weight"].dtype == "F16"
    assert stored["blk.0.attn_norm.weight"].dtype == "F32"
    read = open_checkpoint(file.path).model
    assert not np.asarray(read.blocks[0].up.w[::2]).any()
    np.testing.assert_allclose(
        logits(read, tiny.tokens()), logits(model, tiny.tokens()), atol=0.5, rtol=0
    )


@pytest.mark.parametrize("kind", ["mistral", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_a_window_limits_the_context(kind: str, tmp_path: pathlib.Path) -> None:
    """llama.cpp's LLaMA has no window: up to its length the function is the same."""
    sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    config = {**tiny.MISTRAL, "model_type": kind, **sliding}
    directory = written(tmp_path / "out", float16(tiny.random_model(config)), config)
    file = write_gguf(directory)
    assert file.context == 7 and open_checkpoint(file.path).config["max_position_embeddings"] == 7
    ours, theirs = open_checkpoint(directory).model, open_checkpoint(file.path).model
    tokens = tiny.tokens(length=7)
    np.testing.assert_array_equal(logits(theirs, tokens), logits(ours, tokens))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (tiny.OPT, "output_format=gguf is not possible: Topiary writes no GGUF of opt"),
        ({**tiny.GQA, "hidden_act": "gelu"}, "llama.cpp's LLaMA computes silu, not gelu"),
        (
            {**LLAMA, "rope_scaling": {**YARN, "truncate": False}},
            "llama.cpp rounds the bounds of yarn's ramp",
        ),
        (
            of("smollm3", no_rope_layers=[1, 0, 0, 1]),
            "llama.cpp's smollm3 has no setting for this model's rotary",
        ),
        (
            of("gemma2", **{**GEMMA, "query_pre_attn_scalar": 10}, attn_logit_softcapping=None),
            "gemma2 has no setting for this model's attention_scale, attention_cap",
        ),
        (
            of("gemma3_text", **GEMMA, layer_types=["full_attention", "sliding_attention"] * 2),
            "gemma3 has no setting for this model's windows",
        ),
        (of("qwen3", hidden_act="gelu"), "qwen3 has no setting for this model's act"),
        (of("qwen3", attention_bias=True), "llama.cpp's qwen3 has no biases of o"),
        (of("smollm3", mlp_bias=True), "llama.cpp's smollm3 has no biases of gate, up, down"),
        (
            of("olmo2", tie_word_embeddings=True),
            "llama.cpp's olmo2 takes another matrix than the embedding as the head",
        ),
        (of("gemma", tie_word_embeddings=False), "gemma takes the embedding alone as the head"),
        (of("phi", qk_layernorm=True), "heads that make up the width|this model's qk_norm"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(
    config: Mapping[str, Any], says: str, tmp_path: pathlib.Path
) -> None:
    tiny_tokenizer.write(tmp_path)
    with pytest.raises(InputError, match=says):
        check_gguf(config, tmp_path)


def test_biases_that_an_architecture_lacks_are_refused(tmp_path: pathlib.Path) -> None:
    """A stock Qwen3 has no bias on `down`, which a compensation gives it."""
    model = pruned(of("qwen3"), [2] * 4, [20] * 4, ("down",))
    directory = written(tmp_path / "out", model, of("qwen3"))
    with pytest.raises(InputError, match=r"llama\.cpp's qwen3 has no biases of down"):
        write_gguf(directory)


def test_heads_that_do_not_make_up_the_width_are_filled_or_refused(tmp_path: pathlib.Path) -> None:
    """OLMo 2 divides by the mean square over all heads, so zeros beside them would change it."""
    for kind in ("phi", "olmo2"):
        config = of(kind, num_key_value_heads=6)
        directory = written(tmp_path / kind, pruned(config, [5] * 4, [20] * 4, ()), config)
        if kind == "phi":
            assert read_gguf(write_gguf(directory).path).metadata["phi2.attention.head_count"] == 6
            continue
        with pytest.raises(InputError, match=r"llama\.cpp takes only heads that make up"):
            write_gguf(directory)


def test_the_missing_package_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="output_format=gguf needs the gguf package: pip install"):
        check_gguf(tiny.GQA, tmp_path)


def test_weights_beyond_float16_are_refused(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.GQA)
    large = model.non_block.embed.at[0, 0].set(1e5)
    model = model._replace(non_block=model.non_block.replace(embed=large))
    directory = written(tmp_path / "out", model, tiny.GQA)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight exceeds float16"):
        write_gguf(directory)


def test_the_tokenizer_and_its_template_travel(tmp_path: pathlib.Path) -> None:
    directory = written(tmp_path / "out", tiny.random_model(tiny.GQA), tiny.GQA)
    path = write_gguf(directory).path
    ours, theirs = gguf_tokenizer(path), tiny_tokenizer.tokenizer()
    for text in ("the tin hen", "</s>in the <s>!", ""):
        assert ours.encode(text).ids == theirs.encode(text).ids
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    assert gguf_tokenizer_config(path)["chat_template"] == template
    config = open_checkpoint(path).config
    assert [config[f"{t}_token_id"] for t in ("bos", "eos", "pad")] == [1, 2, 0]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_llama_cpp_gives_the_same_logits(form: Any, tmp_path: pathlib.Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    config, heads, neurons, biases, _ = form
    model = float16(pruned(config, heads, neurons, biases))
    directory = written(tmp_path / "out", model, config)
    path = write_gguf(directory).path
    loaded = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    tokens = tiny.tokens(batch=1)
    loaded.eval(tokens[0].tolist())
    theirs = np.array(loaded.scores[: tokens.shape[1]])
    # llama.cpp keeps keys, values and the inputs of float16 matrices in float16.
    np.testing.assert_allclose(theirs, logits(model, tokens)[0], atol=0.05, rtol=0.01)
    text = "the tin hen</s>in"
    ids = loaded.tokenize(text.encode(), add_bos=True, special=True)
    assert ids == tiny_tokenizer.tokenizer().encode(text).ids
    loaded.close()
