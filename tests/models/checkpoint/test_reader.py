"""Checkpoints are read block by block; every error is one line."""

import gc
import json
import pathlib
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.checkpoint import reader as store
from models.checkpoint.blocks import LazyBlocks, prefetch
from models.checkpoint.reader import in_memory, open_checkpoint
from models.errors import InputError
from models.families import hf
from reference import tiny

State = dict[str, np.ndarray]
UP = "model.layers.1.mlp.up_proj.weight"


def random_state(config: Mapping[str, Any] = tiny.GQA) -> State:
    return tiny.state_of(config, tiny.random_model(config))


@pytest.mark.parametrize("name", tiny.EVERY)
def test_a_checkpoint_is_what_its_files_hold(name: str, tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.EVERY[name])
    state = tiny.state_of(tiny.EVERY[name], model)
    checkpoint = open_checkpoint(tiny.write(tmp_path, state, tiny.EVERY[name]))
    tiny.assert_equal(checkpoint.model, model)
    assert checkpoint.parameters == sum(x.size for x in state.values())
    assert checkpoint.stored_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert checkpoint.directory == tmp_path and checkpoint.config == tiny.EVERY[name]
    assert hf.linear_name(checkpoint.specs[1], "q").endswith("layers.1.self_attn.q_proj")


def test_the_type_in_memory_is_the_one_asked_for(tmp_path: pathlib.Path) -> None:
    state = random_state()
    half = open_checkpoint(
        tiny.write(tmp_path, {n: x.astype(np.float16) for n, x in state.items()})
    ).model
    np.testing.assert_array_equal(
        half.blocks[1].up.w, state[UP].astype(np.float16).astype(np.float32)
    )
    brief = open_checkpoint(tiny.write(tmp_path, state), jnp.bfloat16).model
    assert {x.dtype for x in jax.tree.leaves((brief.non_block, tuple(brief.blocks)))} == {
        jnp.dtype(jnp.bfloat16)
    }
    np.testing.assert_array_equal(
        np.asarray(brief.blocks[1].up.w), state[UP].astype(ml_dtypes.bfloat16)
    )


@pytest.mark.parametrize(
    "config",
    [tiny.GQA, {**tiny.GQA, "tie_word_embeddings": True}, tiny.OPT],
    ids=["llama", "tied", "opt"],
)
def test_bare_decoder_names_are_read_and_surplus_buffers_ignored(
    config: Mapping[str, Any], tmp_path: pathlib.Path
) -> None:
    """Older exporters left out `model.` and stored rotary buffers and a tied head too."""
    model = tiny.random_model(config)
    state = {n.removeprefix("model."): x for n, x in tiny.state_of(config, model).items()}
    if config["model_type"] == "llama":
        state["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    if config.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["embed_tokens.weight"]
    tiny.assert_equal(open_checkpoint(tiny.write(tmp_path, state, config)).model, model)


class Counting:
    """Tensors that count their reads and remember, weakly, what they gave out."""

    def __init__(self, state: State):
        self._state = state
        self.shapes = {n: x.shape for n, x in state.items()}
        self.dtypes = {n: x.dtype.name for n, x in state.items()}
        self.reads: list[str] = []
        self.given: list[weakref.ref[np.ndarray]] = []

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        self.reads.append(name)
        value = self._state[name].copy()
        self.given.append(weakref.ref(value))
        return value


@pytest.fixture
def counting(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    tensors = Counting(random_state())
    tiny.write(tmp_path, {"other": np.ones(1, np.float32)})
    monkeypatch.setattr(store, "open_tensors", lambda directory: tensors)
    return tensors


def test_blocks_are_read_when_indexed_and_kept_nowhere(
    tmp_path: pathlib.Path, counting: Counting
) -> None:
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


def test_the_checkpoint_does_not_hold_blocks_that_were_read(
    tmp_path: pathlib.Path, counting: Counting
) -> None:
    checkpoint = open_checkpoint(tmp_path)
    counting.given.clear()
    block = checkpoint.model.blocks[0]
    assert len(counting.given) == len(jax.tree.leaves(block))
    weak = weakref.ref(block.up.w)
    del block
    gc.collect()
    assert weak() is None and not any(ref() is not None for ref in counting.given)


def test_the_next_block_is_read_while_the_caller_works(
    tmp_path: pathlib.Path, counting: Counting
) -> None:
    checkpoint = open_checkpoint(tmp_path)
    blocks = prefetch(checkpoint.model.blocks)
    first = next(blocks).up.w
    for _ in range(500):
        if any(".layers.1." in name for name in counting.reads):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("nobody read block 1")
    np.testing.assert_array_equal(first, checkpoint.model.blocks[0].up.w)
    weak = weakref.ref(next(blocks).up.w)
    gc.collect()
    assert weak() is None, "a block that its user has let go of is held"
    assert next(blocks, None) is None
    assert list(prefetch(checkpoint.model.blocks, [])) == []
    want = [checkpoint.model.blocks[i].up.w for i in (1, 0, 1)]
    jax.tree.map(
        np.testing.assert_array_equal,
        [b.up.w for b in prefetch(checkpoint.model.blocks, [1, 0, 1])],
        want,
    )


def test_an_error_in_a_prefetched_block_is_raised_when_the_block_is_due(
    tmp_path: pathlib.Path, counting: Counting
) -> None:
    counting._state[UP] = np.full(counting.shapes[UP], np.nan, np.float32)
    blocks = iter(open_checkpoint(tmp_path).model.blocks)
    next(blocks)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        next(blocks)


CONFIG_ERRORS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "has no config.json: model must name a Hugging Face checkpoint directory"),
    "empty": (b"", "cannot be read"),
    "broken": (b'{"model_type": "llama"', "cannot be read"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
    "bottomless": (b"[" * 100_000, "cannot be read"),
    "a list": (b"[]", "is not a JSON object"),
    "a number": (b"3", "is not a JSON object"),
    "no model type": (b"{}", "model_type None is not supported"),
}


def one_line(directory: pathlib.Path, *says: str) -> None:
    """Assert that reading the checkpoint raises one line that holds all of `says`."""
    with pytest.raises(InputError) as caught:
        list(open_checkpoint(directory).model.blocks)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message, message


@pytest.mark.parametrize("kind", CONFIG_ERRORS)
def test_a_wrong_config_file_is_refused(kind: str, tmp_path: pathlib.Path) -> None:
    content, says = CONFIG_ERRORS[kind]
    tiny.write(tmp_path, random_state())
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    one_line(tmp_path, says, "" if "model_type" in says else str(tmp_path))


def test_a_directory_in_place_of_a_config_file_is_refused(tmp_path: pathlib.Path) -> None:
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
def test_tensors_that_disagree_with_the_configuration_are_refused(
    kind: str, tmp_path: pathlib.Path
) -> None:
    change, says = STATE_ERRORS[kind]
    state = random_state()
    change(state)
    one_line(tiny.write(tmp_path, state), *says)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda t: t.__name__
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [UP, "model.norm.weight"])
def test_numbers_that_are_not_finite_are_refused(
    name: str, value: float, dtype: Any, tmp_path: pathlib.Path
) -> None:
    state = random_state()
    state[name] = state[name].copy()
    state[name].flat[7] = value
    tiny.write(tmp_path, {n: x.astype(dtype) for n, x in state.items()})
    one_line(tmp_path, f"tensor {name} holds NaN or infinity")


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda t: t.__name__
)
def test_large_numbers_are_finite(dtype: Any, tmp_path: pathlib.Path) -> None:
    """Their sum overflows, which must neither count as infinity nor warn."""
    largest = np.full((40, 32), ml_dtypes.finfo(dtype).max, dtype)
    model = open_checkpoint(tiny.write(tmp_path, {**random_state(), UP: largest})).model
    np.testing.assert_array_equal(model.blocks[1].up.w, largest.astype(np.float32))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_hidden_layers", 2 * 10**9, "num_hidden_layers must be an integer from 1 to 10000"),
        ("num_hidden_layers", 9000, "num_hidden_layers=9000, but the weights hold 2 blocks"),
        ("num_hidden_layers", 3, "num_hidden_layers=3, but the weights hold 2 blocks"),
        ("hidden_size", 2**31, "hidden_size must be an integer from 1 to 2147483647"),
        ("rms_norm_eps", 10**400, "an integer of 401 digits"),
        ("rms_norm_eps", 1e300, "rms_norm_eps must be a positive number"),
        ("rms_norm_eps", None, "rms_norm_eps must be a positive number, not None"),
        ("hidden_act", "y" * 5000, "is not supported"),
        ("torch_dtype", "\ud800", "half of a surrogate pair"),
    ],
)
def test_numbers_without_bounds_are_refused_before_anything_is_built(
    field: str, value: Any, says: str, tmp_path: pathlib.Path
) -> None:
    tiny.write(tmp_path, random_state())
    config = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    begun = time.monotonic()
    one_line(tmp_path, says)
    assert time.monotonic() - begun < 5


ROTARY = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}


@pytest.mark.parametrize("listed", [True, False], ids=["the index lists", "a shard holds"])
def test_shards_and_index_may_disagree_about_buffers(listed: bool, tmp_path: pathlib.Path) -> None:
    state = random_state()
    want = open_checkpoint(tiny.write(tmp_path / "whole", state)).model.blocks[0].up.w
    tiny.write(tmp_path, state)
    (tmp_path / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    save_file(state | ({} if listed else ROTARY), tmp_path / shard, metadata={"format": "pt"})
    weight_map = dict.fromkeys([*state, *(ROTARY if listed else ())], shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(open_checkpoint(tmp_path).model.blocks[0].up.w, want)
