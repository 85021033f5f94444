"""Checkpoints: read block by block, written block by block, loaded by transformers, and what is wrong with them said in one line."""

import gc
import json
import pathlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import hf, store
from models.arch import Model, logits
from models.errors import InputError
from models.store import LazyBlocks, Writer, in_memory, open_checkpoint, save
from models.surgery import cut
from reference import tiny, torch_models

State = dict[str, np.ndarray]
FAMILIES = {**tiny.FAMILIES, "qwen2": tiny.QWEN2, "opt-350m": tiny.OPT_350M}
UP = "model.layers.1.mlp.up_proj.weight"


def state_of(config: Mapping[str, Any], model: Model) -> State:
    """The model's arrays under their checkpoint names."""
    names = jax.tree.leaves(hf.specs(config)[1:], is_leaf=hf.is_spec)
    return {s.name: np.asarray(x) for s, x in zip(names, jax.tree.leaves((model.ends, tuple(model.blocks))), strict=True)}


def write(directory: pathlib.Path, state: State, config: Mapping[str, Any] = tiny.GQA) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    save_file({n: np.ascontiguousarray(v) for n, v in state.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def random_state(config: Mapping[str, Any] = tiny.GQA) -> State:
    return state_of(config, tiny.random_model(config))


def assert_equal(got: Model, expected: Model) -> None:
    assert got.arch is expected.arch
    jax.tree.map(np.testing.assert_array_equal, (got.ends, tuple(got.blocks)), (expected.ends, tuple(expected.blocks)))


# Reading.


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_what_its_files_hold(name: str, tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(FAMILIES[name])
    state = state_of(FAMILIES[name], model)
    checkpoint = open_checkpoint(write(tmp_path, state, FAMILIES[name]))
    assert_equal(checkpoint.model, model)
    assert checkpoint.parameters == sum(x.size for x in state.values())
    assert checkpoint.stored_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert checkpoint.directory == tmp_path and checkpoint.config == FAMILIES[name]
    assert hf.linear_name(checkpoint.specs[1], "q").endswith("layers.1.self_attn.q_proj")


def test_the_type_in_memory_is_the_one_asked_for(tmp_path: pathlib.Path) -> None:
    state = random_state()
    half = open_checkpoint(write(tmp_path, {n: x.astype(np.float16) for n, x in state.items()})).model
    np.testing.assert_array_equal(half.blocks[1].up.w, state[UP].astype(np.float16).astype(np.float32))
    brief = open_checkpoint(write(tmp_path, state), jnp.bfloat16).model
    assert {x.dtype for x in jax.tree.leaves((brief.ends, tuple(brief.blocks)))} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(np.asarray(brief.blocks[1].up.w), state[UP].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("config", [tiny.GQA, {**tiny.GQA, "tie_word_embeddings": True}, tiny.OPT], ids=["llama", "tied", "opt"])
def test_names_of_the_bare_decoder_and_surplus_buffers(config: Mapping[str, Any], tmp_path: pathlib.Path) -> None:
    """Older exporters left out the leading `model.`, and stored rotary buffers and a tied head besides the weights."""
    model = tiny.random_model(config)
    state = {n.removeprefix("model."): x for n, x in state_of(config, model).items()}
    if config["model_type"] == "llama":
        state["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    if config.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["embed_tokens.weight"]
    assert_equal(open_checkpoint(write(tmp_path, state, config)).model, model)


class Counting:
    """Tensors that count their reads and remember, weakly, what they gave out."""

    def __init__(self, state: State):
        self._state = state
        self.shapes = {n: x.shape for n, x in state.items()}
        self.reads: list[str] = []
        self.given: list[weakref.ref[np.ndarray]] = []

    def read(self, name: str) -> np.ndarray:
        self.reads.append(name)
        value = self._state[name].copy()
        self.given.append(weakref.ref(value))
        return value


@pytest.fixture
def counting(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    tensors = Counting(random_state())
    write(tmp_path, {"other": np.ones(1, np.float32)})
    monkeypatch.setattr(store, "open_tensors", lambda directory: tensors)
    return tensors


def test_blocks_are_read_when_indexed_and_kept_nowhere(tmp_path: pathlib.Path, counting: Counting) -> None:
    def names(i: int) -> set[str]:
        return {n for n in counting.shapes if f".layers.{i}." in n}

    def reads() -> list[str]:
        found = list(counting.reads)
        counting.reads.clear()
        return found

    checkpoint = open_checkpoint(tmp_path)
    blocks = checkpoint.model.blocks
    assert isinstance(blocks, LazyBlocks) and len(blocks) == 2
    assert set(reads()) == counting.shapes.keys() - names(0) - names(1)
    for i in (1, -1, 1):
        blocks[i]
        found = reads()
        assert set(found) == names(1) and len(found) == len(names(1))
    assert [b.up.w.shape for b in blocks[:1]] == [(40, 32)] and set(reads()) == names(0)
    assert len(list(blocks)) == 2 and len(reads()) == len(names(0)) + len(names(1))
    with pytest.raises(IndexError):
        blocks[2]

    held = in_memory(checkpoint.model)
    assert len(reads()) == len(names(0)) + len(names(1))
    assert held.blocks[0] is held.blocks[0] and not reads()


def test_what_was_read_is_not_held_by_the_checkpoint(tmp_path: pathlib.Path, counting: Counting) -> None:
    checkpoint = open_checkpoint(tmp_path)
    counting.given.clear()
    block = checkpoint.model.blocks[0]
    assert len(counting.given) == len(jax.tree.leaves(block))
    weak = weakref.ref(block.up.w)
    del block
    gc.collect()
    assert weak() is None and not any(ref() is not None for ref in counting.given)


# What is wrong with a checkpoint.

CONFIG_ERRORS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "has no config.json: --model must name a Hugging Face checkpoint directory"),
    "empty": (b"", "cannot be read"),
    "broken": (b'{"model_type": "llama"', "cannot be read"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
    "bottomless": (b"[" * 100_000, "cannot be read"),
    "a list": (b"[]", "is not a JSON object"),
    "a number": (b"3", "is not a JSON object"),
    "no model type": (b"{}", "model_type None is not supported"),
}


def one_line(directory: pathlib.Path, *says: str) -> None:
    """Opening the checkpoint and reading its blocks raises one line that holds all of `says`."""
    with pytest.raises(InputError) as caught:
        list(open_checkpoint(directory).model.blocks)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message, message


@pytest.mark.parametrize("kind", CONFIG_ERRORS)
def test_wrong_config_files(kind: str, tmp_path: pathlib.Path) -> None:
    content, says = CONFIG_ERRORS[kind]
    write(tmp_path, random_state())
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    one_line(tmp_path, says, "" if "model_type" in says else str(tmp_path))


def test_a_directory_for_a_config_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").mkdir()
    one_line(tmp_path, "cannot be read", str(tmp_path / "config.json"))


def without(*names: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in names:
            del state[name]

    return change


def put(name: str, value: np.ndarray) -> Callable[[State], None]:
    return lambda state: state.update({name: value})


ONES = np.ones((40, 32), np.float32)
STATE_ERRORS: dict[str, tuple[Callable[[State], None], tuple[str, ...]]] = {
    "one missing": (without(UP), ("lacks", UP)),
    "many missing": (
        without(*(f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo")),
        ("lacks", "q_proj.weight", "and 1 more"),
    ),
    "head missing": (without("lm_head.weight"), ("lacks", "lm_head.weight")),
    "a block too many": (
        put("model.layers.2.mlp.up_proj.weight", ONES),
        ("model.layers.2.mlp.up_proj.weight", "does not account for"),
    ),
    "a bias too many": (
        put("model.layers.0.mlp.up_proj.bias", ONES[:, 0]),
        ("model.layers.0.mlp.up_proj.bias", "does not account for"),
    ),
    "transposed": (put(UP, ONES.T.copy()), (UP, "[32, 40]", "[40, 32]")),
    "one dimension": (put(UP, ONES.reshape(-1)), (UP, "[1280]", "[40, 32]")),
}


@pytest.mark.parametrize("kind", STATE_ERRORS)
def test_tensors_that_disagree_with_the_configuration(kind: str, tmp_path: pathlib.Path) -> None:
    change, says = STATE_ERRORS[kind]
    state = random_state()
    change(state)
    one_line(write(tmp_path, state), *says)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda t: t.__name__)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [UP, "model.norm.weight"])
def test_numbers_that_are_not_finite(name: str, value: float, dtype: Any, tmp_path: pathlib.Path) -> None:
    state = random_state()
    state[name] = state[name].copy()
    state[name].flat[7] = value
    write(tmp_path, {n: x.astype(dtype) for n, x in state.items()})
    one_line(tmp_path, f"tensor {name} holds NaN or infinity")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda t: t.__name__)
def test_large_numbers_are_finite(dtype: Any, tmp_path: pathlib.Path) -> None:
    """Their sum is not, which must neither be taken for infinity nor warn."""
    largest = np.full((40, 32), ml_dtypes.finfo(dtype).max, dtype)
    model = open_checkpoint(write(tmp_path, {**random_state(), UP: largest})).model
    np.testing.assert_array_equal(model.blocks[1].up.w, largest.astype(np.float32))


# Writing.


def pruned(model: Model, group: str, ragged: bool) -> Model:
    """The model with units of `group` cut: every other one, or in block 1 all but the first."""
    g = model.arch.group(group)
    keeps = [np.arange(40 if group == "neurons" else 2) % 2 == 0 for _ in model.blocks]
    if ragged:
        keeps[1] = np.arange(len(keeps[1])) == 0
        keeps[0][:] = True
    return model._replace(blocks=tuple(cut(b, g, k) for b, k in zip(model.blocks, keeps, strict=True)))


def written(
    directory: pathlib.Path, model: Model, config: Mapping[str, Any], shard_bytes: int = store.SHARD_BYTES
) -> tuple[Writer, bool]:
    """Write the model, with a directory that holds nothing for companions."""
    companions = directory.parent / "companions"
    companions.mkdir(exist_ok=True)
    writer = Writer(directory, config, shard_bytes)
    for i, block in enumerate(model.blocks):
        writer.put(i, block)
    return writer, writer.finish(model.ends, companions)


def assert_transformers_agrees(directory: pathlib.Path, model: Model) -> None:
    tokens = tiny.tokens()
    theirs = torch_models.logits(torch_models.load(directory), tokens)
    np.testing.assert_allclose(np.asarray(logits(model, tokens)), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_exact(name: str, dtype: str, tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(FAMILIES[name])
    ends, blocks = jax.tree.map(lambda x: x.astype(dtype), (model.ends, model.blocks))
    save(tmp_path / "out", Model(model.arch, ends, blocks), FAMILIES[name], tmp_path)
    checkpoint = open_checkpoint(tmp_path / "out", jnp.dtype(dtype))
    assert_equal(checkpoint.model, Model(model.arch, ends, blocks))
    assert checkpoint.config["dtype"] == checkpoint.config["torch_dtype"] == dtype
    assert {str(x.dtype) for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_is_saved(name: str, tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(FAMILIES[name])
    save(tmp_path / "out", model, FAMILIES[name], tmp_path)
    assert_transformers_agrees(tmp_path / "out", model)


def test_transformers_loads_bfloat16(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.GQA)
    ends, blocks = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (model.ends, model.blocks))
    save(tmp_path / "out", Model(model.arch, ends, blocks), tiny.GQA, tmp_path)
    ends, blocks = jax.tree.map(lambda x: x.astype(jnp.float32), (ends, blocks))
    assert_transformers_agrees(tmp_path / "out", Model(model.arch, ends, blocks))


@pytest.mark.parametrize("name", ["biased", "opt"])
def test_fewer_neurons_are_a_smaller_model(name: str, tmp_path: pathlib.Path) -> None:
    config = FAMILIES[name]
    model = pruned(tiny.random_model(config), "neurons", ragged=False)
    writer, padded = written(tmp_path / "out", model, config)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert not padded and checkpoint.config[hf.family(config).neurons] == 20
    assert writer.parameters == checkpoint.parameters == sum(x.size for x in jax.tree.leaves((model.ends, model.blocks)))
    jax.tree.map(np.testing.assert_array_equal, tuple(checkpoint.model.blocks), model.blocks)
    assert_transformers_agrees(tmp_path / "out", model)


@pytest.mark.parametrize("shard_bytes", [store.SHARD_BYTES, 5000])
@pytest.mark.parametrize(("name", "group"), [("biased", "neurons"), ("biased", "heads"), ("opt", "neurons"), ("opt", "heads")])
def test_ragged_blocks_are_padded(name: str, group: str, shard_bytes: int, tmp_path: pathlib.Path) -> None:
    """Zeros fill the narrower blocks up; the function stays, and the size on disk is that of the padded model."""
    config = {**tiny.OPT, "num_attention_heads": 2} if name == "opt" else FAMILIES[name]
    model = pruned(tiny.random_model(config), group, ragged=True)
    writer, padded = written(tmp_path / "out", model, config, shard_bytes)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert padded and checkpoint.config[hf.family(config).neurons] == 40
    assert writer.parameters == sum(x.size for x in jax.tree.leaves((model.ends, model.blocks))) < checkpoint.parameters
    check_index(tmp_path / "out", 1 if shard_bytes == store.SHARD_BYTES else None)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.model.blocks[0], model.blocks[0])
    np.testing.assert_allclose(logits(checkpoint.model, tiny.tokens()), logits(model, tiny.tokens()), rtol=1e-4, atol=1e-4)
    if shard_bytes != store.SHARD_BYTES:
        assert_transformers_agrees(tmp_path / "out", model)


def test_blocks_without_a_neuron_left(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.BIASED)
    g = model.arch.group("neurons")
    empty = model._replace(blocks=tuple(cut(b, g, np.zeros(40, bool)) for b in model.blocks))
    _, padded = written(tmp_path / "out", empty, tiny.BIASED)
    assert padded and open_checkpoint(tmp_path / "out").config["intermediate_size"] == 1
    assert_transformers_agrees(tmp_path / "out", empty)


def check_index(directory: pathlib.Path, shards: int | None = None) -> list[pathlib.Path]:
    """The shards' names, their index and its total agree with what the files hold."""
    files = sorted(directory.glob("*.safetensors"))
    if shards == 1:
        assert [f.name for f in files] == ["model.safetensors"] and not (directory / "model.safetensors.index.json").exists()
        return files
    assert [f.name for f in files] == [f"model-{k + 1:05d}-of-{len(files):05d}.safetensors" for k in range(len(files))]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    held = {f.name: load_file(f) for f in files}
    assert index["weight_map"] == {n: f for f, tensors in held.items() for n in tensors}
    assert index["metadata"] == {"total_size": sum(x.nbytes for tensors in held.values() for x in tensors.values())}
    return files


@pytest.mark.parametrize(("limit", "shards"), [(1, 21), (8000, None), (10**6, 1)])
def test_shards(limit: int, shards: int | None, tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.GQA)
    written(tmp_path / "out", model, tiny.GQA, limit)
    files = check_index(tmp_path / "out", shards)
    assert shards is None or len(files) == shards
    for f in files:
        tensors = load_file(f)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= limit
    checkpoint = open_checkpoint(tmp_path / "out")
    assert_equal(checkpoint.model, model)
    assert checkpoint.stored_bytes == sum(f.stat().st_size for f in files)


def test_shards_are_written_as_they_fill(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.GQA)
    writer = Writer(tmp_path / "out", tiny.GQA, 8000)
    writer.put(0, model.blocks[0])
    on_disk = sum(x.nbytes for f in (tmp_path / "out").iterdir() for x in load_file(f).values())
    assert on_disk >= sum(x.nbytes for x in jax.tree.leaves(model.blocks[0])) - 8000
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_bias_that_has_no_name_is_not_lost(tmp_path: pathlib.Path) -> None:
    block = tiny.random_model(tiny.GQA).blocks[0]
    block = block.replace(down=block.down.replace(b=jnp.zeros(32)))
    with pytest.raises(ValueError, match="10 arrays for 9 names"):
        Writer(tmp_path / "out", tiny.GQA).put(0, block)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "rope",
    [{"rope_parameters": {"rope_theta": 500.0, **LLAMA3}}, {"rope_theta": 500.0, "rope_scaling": LLAMA3}],
    ids=["new spelling", "old spelling"],
)
def test_rotary_settings_survive_in_every_spelling(rope: dict[str, Any], tmp_path: pathlib.Path) -> None:
    config = {**tiny.GQA, **rope}
    model = tiny.random_model(config)
    save(tmp_path / "out", model, config, tmp_path)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["rope_theta"], stored["rope_scaling"]) == (500.0, LLAMA3)  # what transformers 4 reads
    assert hf.specs(stored)[0] is model.arch
    assert_transformers_agrees(tmp_path / "out", model)


def test_tokenizer_and_generation_files_are_copied(tmp_path: pathlib.Path) -> None:
    source, model = tmp_path / "source", tiny.random_model(tiny.GQA)
    copied = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"]
    copied += ["added_tokens.json", "chat_template.jinja", "generation_config.json"]
    write(source, random_state())
    for name in [*copied, "README.md", "pytorch_model.bin", "model.safetensors.index.json", "training_args.bin"]:
        (source / name).write_text(name)
    (source / "tokenizer_files").mkdir()
    save(tmp_path / "out", model, tiny.GQA, source)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {*copied, "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == name for name in copied)


def test_generation_settings_are_made_where_there_are_none(tmp_path: pathlib.Path) -> None:
    config = {**tiny.GQA, "pad_token_id": None}
    save(tmp_path / "out", tiny.random_model(config), config, tmp_path)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_companions_of_a_gguf_file(tmp_path: pathlib.Path) -> None:
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
