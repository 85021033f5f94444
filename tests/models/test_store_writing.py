"""Checkpoints are written block by block; our loader gets the bits, transformers our logits."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.arch import Model, logits
from models.checkpoint.reader import open_checkpoint
from models.checkpoint.writer import SHARD_BYTES, Writer, save
from models.families import hf
from models.surgery import cut
from reference import tiny, torch_models


def pruned(model: Model, group: str, ragged: bool) -> Model:
    """Cut units of `group`: every other one, or in block 1 all but the first."""
    g = model.arch.group(group)
    keeps = [np.arange(40 if group == "neurons" else 2) % 2 == 0 for _ in model.blocks]
    if ragged:
        keeps[1] = np.arange(len(keeps[1])) == 0
        keeps[0][:] = True
    return model._replace(
        blocks=tuple(cut(b, g, k) for b, k in zip(model.blocks, keeps, strict=True))
    )


def assert_transformers_agrees(directory: pathlib.Path, model: Model) -> None:
    tokens = tiny.tokens()
    theirs = torch_models.logits(torch_models.load(directory), tokens)
    np.testing.assert_allclose(np.asarray(logits(model, tokens)), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny.EVERY)
def test_round_trip_is_exact(name: str, dtype: str, tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.EVERY[name])
    non_block, blocks = jax.tree.map(lambda x: x.astype(dtype), (model.non_block, model.blocks))
    save(tmp_path / "out", Model(model.arch, non_block, blocks), tiny.EVERY[name], tmp_path)
    checkpoint = open_checkpoint(tmp_path / "out", jnp.dtype(dtype))
    tiny.assert_equal(checkpoint.model, Model(model.arch, non_block, blocks))
    assert checkpoint.config["dtype"] == checkpoint.config["torch_dtype"] == dtype
    assert {str(x.dtype) for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        dtype
    }
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("name", tiny.EVERY)
def test_transformers_loads_what_is_saved(name: str, tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.EVERY[name])
    save(tmp_path / "out", model, tiny.EVERY[name], tmp_path)
    assert_transformers_agrees(tmp_path / "out", model)


def test_transformers_loads_bfloat16(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.GQA)
    non_block, blocks = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), (model.non_block, model.blocks)
    )
    save(tmp_path / "out", Model(model.arch, non_block, blocks), tiny.GQA, tmp_path)
    non_block, blocks = jax.tree.map(lambda x: x.astype(jnp.float32), (non_block, blocks))
    assert_transformers_agrees(tmp_path / "out", Model(model.arch, non_block, blocks))


@pytest.mark.parametrize("name", ["biased", "opt"])
def test_fewer_neurons_make_a_smaller_model(name: str, tmp_path: pathlib.Path) -> None:
    config = tiny.EVERY[name]
    model = pruned(tiny.random_model(config), "neurons", ragged=False)
    writer, form = tiny.written(tmp_path / "out", model, config)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (
        form.label == f"stock {config['model_type']}"
        and checkpoint.config[hf.family(config).neurons] == 20
    )
    assert (
        writer.parameters
        == checkpoint.parameters
        == sum(x.size for x in jax.tree.leaves((model.non_block, model.blocks)))
    )
    jax.tree.map(np.testing.assert_array_equal, tuple(checkpoint.model.blocks), model.blocks)
    assert_transformers_agrees(tmp_path / "out", model)


@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 5000])
@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("biased", "neurons"),
        ("opt", "heads"),
        pytest.param("biased", "heads", marks=pytest.mark.slow),
        pytest.param("opt", "neurons", marks=pytest.mark.slow),
    ],
)
def test_ragged_blocks_are_padded(
    name: str, group: str, shard_bytes: int, tmp_path: pathlib.Path
) -> None:
    """Zeros fill the narrower blocks up: the function stays, the size is the padded model's."""
    config = {**tiny.OPT, "num_attention_heads": 2} if name == "opt" else tiny.EVERY[name]
    model = pruned(tiny.random_model(config), group, ragged=True)
    writer, form = tiny.written(tmp_path / "out", model, config, shard_bytes, "padded")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (
        form.label == f"stock {config['model_type']}"
        and checkpoint.config[hf.family(config).neurons] == 40
    )
    assert (
        writer.parameters
        == sum(x.size for x in jax.tree.leaves((model.non_block, model.blocks)))
        < checkpoint.parameters
    )
    check_index(tmp_path / "out", 1 if shard_bytes == SHARD_BYTES else None)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.model.blocks[0], model.blocks[0])
    np.testing.assert_allclose(
        logits(checkpoint.model, tiny.tokens()), logits(model, tiny.tokens()), rtol=1e-4, atol=1e-4
    )
    if shard_bytes != SHARD_BYTES:
        assert_transformers_agrees(tmp_path / "out", model)


def test_a_block_without_neurons_is_stored_with_one_of_zeros(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.BIASED)
    g = model.arch.group("neurons")
    empty = model._replace(blocks=tuple(cut(b, g, np.zeros(40, bool)) for b in model.blocks))
    tiny.written(tmp_path / "out", empty, tiny.BIASED)
    assert open_checkpoint(tmp_path / "out").config["intermediate_size"] == 1
    assert_transformers_agrees(tmp_path / "out", empty)


def check_index(directory: pathlib.Path, shards: int | None = None) -> list[pathlib.Path]:
    """Assert that the shards' names, their index and its total agree with the files."""
    files = sorted(directory.glob("*.safetensors"))
    if shards == 1:
        assert [f.name for f in files] == ["model.safetensors"] and not (
            directory / "model.safetensors.index.json"
        ).exists()
        return files
    assert [f.name for f in files] == [
        f"model-{k + 1:05d}-of-{len(files):05d}.safetensors" for k in range(len(files))
    ]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    held = {f.name: load_file(f) for f in files}
    assert index["weight_map"] == {n: f for f, tensors in held.items() for n in tensors}
    assert index["metadata"] == {
        "total_size": sum(x.nbytes for tensors in held.values() for x in tensors.values())
    }
    return files


@pytest.mark.parametrize(("limit", "shards"), [(1, 21), (8000, None), (10**6, 1)])
def test_shards_and_their_index_agree(
    limit: int, shards: int | None, tmp_path: pathlib.Path
) -> None:
    model = tiny.random_model(tiny.GQA)
    tiny.written(tmp_path / "out", model, tiny.GQA, limit)
    files = check_index(tmp_path / "out", shards)
    assert shards is None or len(files) == shards
    for f in files:
        tensors = load_file(f)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= limit
    checkpoint = open_checkpoint(tmp_path / "out")
    tiny.assert_equal(checkpoint.model, model)
    assert checkpoint.stored_bytes == sum(f.stat().st_size for f in files)


def test_shards_are_written_as_they_fill(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.GQA)
    writer = Writer(tmp_path / "out", tiny.GQA, shard_bytes=8000)
    writer.put(0, model.blocks[0])
    on_disk = sum(
        x.nbytes for f in (tmp_path / "out" / "unfinished").iterdir() for x in load_file(f).values()
    )
    assert on_disk >= sum(x.nbytes for x in jax.tree.leaves(model.blocks[0])) - 8000
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_lost_bias_is_an_error(tmp_path: pathlib.Path) -> None:
    block = tiny.random_model(tiny.BIASED).blocks[0]
    with pytest.raises(ValueError, match=r"down_proj.bias was lost"):
        Writer(tmp_path / "out", tiny.BIASED).put(0, block.replace(down=block.down.replace(b=None)))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_theta": 500.0, **tiny.LLAMA3}},
        {"rope_theta": 500.0, "rope_scaling": tiny.LLAMA3},
    ],
    ids=["new spelling", "old spelling"],
)
def test_rotary_settings_survive_in_every_spelling(
    rope: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    config = {**tiny.GQA, **rope}
    model = tiny.random_model(config)
    save(tmp_path / "out", model, config, tmp_path)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["rope_theta"], stored["rope_scaling"]) == (
        500.0,
        tiny.LLAMA3,
    )  # what transformers 4 reads
    assert hf.specs(stored)[0] is model.arch
    assert_transformers_agrees(tmp_path / "out", model)


def test_tokenizer_and_generation_files_are_copied(tmp_path: pathlib.Path) -> None:
    source, model = tmp_path / "source", tiny.random_model(tiny.GQA)
    copied = [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
    ]
    copied += ["added_tokens.json", "chat_template.jinja", "generation_config.json"]
    tiny.write(source, tiny.state_of(tiny.GQA, model))
    for name in [
        *copied,
        "README.md",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "training_args.bin",
    ]:
        (source / name).write_text(json.dumps({"name": name}))
    (source / "tokenizer_files").mkdir()
    save(tmp_path / "out", model, tiny.GQA, source)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        *copied,
        "config.json",
        "model.safetensors",
    }
    for name in copied:
        assert json.loads((tmp_path / "out" / name).read_text()) == {"name": name}


def test_generation_settings_are_made_where_there_are_none(tmp_path: pathlib.Path) -> None:
    config = {**tiny.GQA, "pad_token_id": None}
    save(tmp_path / "out", tiny.random_model(config), config, tmp_path)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_the_tokenizer_of_a_gguf_file_is_written_out(tmp_path: pathlib.Path) -> None:
    """Its tokenizer is written as transformers reads it."""
    gguf = pytest.importorskip("gguf")
    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    save(tmp_path / "out", tiny.random_model(tiny.GQA), tiny.GQA, tmp_path / "m.gguf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("ab ab", add_special_tokens=False) == [7, 7]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("name", ["llama", "gqa", "qwen2"])
def test_added_biases_load_as_stock_llama(name: str, tmp_path: pathlib.Path) -> None:
    """Some blocks have biases on readers, as FLAP adds them, and blocks differ in width."""
    config = tiny.EVERY[name]
    model = pruned(tiny.random_model(config), "neurons", ragged=True)
    first = model.blocks[0]
    first = first.replace(
        o=first.o.replace(b=jnp.linspace(-1, 1, 32)),
        down=first.down.replace(b=jnp.linspace(1, 2, 32)),
    )
    model = model._replace(blocks=(first, *model.blocks[1:]))
    writer, _ = tiny.written(tmp_path / "out", model, config, layout="padded")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config["model_type"] == "llama" and checkpoint.config["attention_bias"]
    assert writer.parameters == sum(
        leaf.size for leaf in jax.tree.leaves((model.non_block, model.blocks))
    )
    np.testing.assert_allclose(
        logits(checkpoint.model, tiny.tokens()), logits(model, tiny.tokens()), atol=1e-5
    )
    assert not np.asarray(checkpoint.model.blocks[1].o.b).any()
    assert_transformers_agrees(tmp_path / "out", model)


DEEP_QWEN2 = {
    **tiny.QWEN2,
    "num_hidden_layers": 5,
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 2,
}
TYPED_QWEN2 = {
    **DEEP_QWEN2,
    "layer_types": ["sliding_attention", *["full_attention", "sliding_attention"] * 2],
}


@pytest.mark.parametrize(
    "config",
    [
        DEEP_QWEN2,
        TYPED_QWEN2,
        *({**c, "num_hidden_layers": 5} for c in (tiny.MISTRAL, tiny.GQA, tiny.OPT)),
    ],
)
def test_blocks_that_are_left_out_take_their_settings_along(
    config: Mapping[str, Any], tmp_path: pathlib.Path
) -> None:
    """A block keeps its own window whatever number it gets."""
    model, kept = tiny.random_model(config), (0, 1, 3)
    less = model._replace(blocks=tuple(model.blocks[i] for i in kept))
    writer = Writer(tmp_path / "out", config)
    for i, block in enumerate(less.blocks):
        writer.put(i, block)
    writer.finish(less.non_block, tmp_path, kept)
    loaded = open_checkpoint(tmp_path / "out")
    assert [getattr(b, "window", None) for b in loaded.model.blocks] == [
        getattr(b, "window", None) for b in less.blocks
    ]
    assert loaded.config["num_hidden_layers"] == 3
    jax.tree.map(
        np.testing.assert_array_equal,
        (loaded.model.non_block, tuple(loaded.model.blocks)),
        (less.non_block, less.blocks),
    )
    assert_transformers_agrees(tmp_path / "out", less)
