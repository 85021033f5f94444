"""Heads that config.json calls tied are what the files hold, and types are those of the files."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.arch import logits
from models.checkpoint.reader import open_checkpoint
from models.checkpoint.writer import Writer
from models.errors import InputError
from reference import tiny, torch_models

TIED = {**tiny.GQA, "tie_word_embeddings": True}
TIED_OPT = {**tiny.OPT, "tie_word_embeddings": True}
EMBEDDING = {"llama": "model.embed_tokens.weight", "opt": "model.decoder.embed_tokens.weight"}
HEAD = "lm_head.weight"
State = dict[str, np.ndarray]
both_families = pytest.mark.parametrize(
    "config",
    [
        pytest.param(TIED, id="llama"),
        pytest.param(TIED_OPT, id="opt", marks=pytest.mark.slow),
    ],
)


def state_of(config: dict[str, Any]) -> State:
    return tiny.state_of(config, tiny.random_model(config))


def copied(source: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """Write the checkpoint again as a pruning run does."""
    checkpoint = open_checkpoint(source)
    writer = Writer(output, checkpoint.config)
    for i, block in enumerate(checkpoint.model.blocks):
        writer.put(i, block)
    writer.finish(checkpoint.model.non_block, source)
    return output


@both_families
def test_a_tied_head_that_differs_is_a_head_as_in_transformers(
    config: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """Transformers warns about such a file, and computes with both matrices."""
    state = state_of(config)
    embedding = state[EMBEDDING[config["model_type"]]]
    state[HEAD] = 1.3 * embedding + np.float32(0.1)
    source = tiny.write(tmp_path / "in", state, config)
    checkpoint, tokens = open_checkpoint(source), tiny.tokens()
    np.testing.assert_array_equal(checkpoint.model.non_block.head.w, state[HEAD])
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "a head that differs" in checkpoint.remarks[0]
    output = copied(source, tmp_path / "out")
    ours = logits(checkpoint.model, tokens)
    np.testing.assert_array_equal(load_file(output / "model.safetensors")[HEAD], state[HEAD])
    np.testing.assert_allclose(logits(open_checkpoint(output).model, tokens), ours, atol=1e-5)
    for directory in (source, output):
        theirs = torch_models.logits(torch_models.load(directory), tokens)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_stored_copy_of_the_embedding_stays_tied(tmp_path: pathlib.Path) -> None:
    state = state_of(TIED)
    state[HEAD] = state[EMBEDDING["llama"]].copy()
    checkpoint = open_checkpoint(tiny.write(tmp_path, state, TIED))
    assert checkpoint.model.non_block.head is None and not checkpoint.remarks


@both_families
def test_an_embedding_stored_as_the_head_alone_is_read(
    config: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    state = state_of(config)
    state[HEAD] = state.pop(EMBEDDING[config["model_type"]])
    source = tiny.write(tmp_path, state, config)
    model, tokens = open_checkpoint(source).model, tiny.tokens()
    np.testing.assert_array_equal(model.non_block.embed, state[HEAD])
    theirs = torch_models.logits(torch_models.load(source), tokens)
    np.testing.assert_allclose(logits(model, tokens), theirs, atol=1e-4)


@pytest.mark.parametrize("bare", [False, True])
def test_heads_of_trainers_are_left_out(bare: bool, tmp_path: pathlib.Path) -> None:
    state = state_of(tiny.GQA)
    if bare:
        state = {name.removeprefix("model."): x for name, x in state.items()}
    state |= {"v_head.summary.weight": np.ones((1, 32)), "v_head.summary.bias": np.ones(1)}
    checkpoint = open_checkpoint(tiny.write(tmp_path, state))
    tiny.assert_equal(checkpoint.model, tiny.random_model(tiny.GQA))
    assert "v_head.summary.weight" in checkpoint.remarks[0]


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "lm_head.bias"])
def test_a_surplus_tensor_of_the_model_itself_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    state = state_of(tiny.GQA) | {name: np.ones(96, np.float32)}
    with pytest.raises(InputError, match="does not account for"):
        open_checkpoint(tiny.write(tmp_path, state))


def as_type(state: State, dtype: Any, norms: Any = None) -> State:
    return {n: x.astype(norms if norms and x.ndim == 1 else dtype) for n, x in state.items()}


@pytest.mark.parametrize(
    ("dtype", "norms", "expected"),
    [
        (np.float16, None, "float16"),
        (ml_dtypes.bfloat16, None, "bfloat16"),
        (np.float32, None, "float32"),
        (np.float64, None, "float32"),
        (np.float32, np.float16, "float32"),
        # Norms of random float32 numbers do not fit 16 bits.
        (np.float16, np.float32, "float32"),
    ],
)
def test_the_type_of_a_checkpoint_is_that_of_its_numbers(
    dtype: Any, norms: Any, expected: str, tmp_path: pathlib.Path
) -> None:
    source = tiny.write(tmp_path, as_type(state_of(tiny.GQA), dtype, norms))
    assert open_checkpoint(source).dtype == expected


def test_wide_norms_that_hold_narrow_numbers_do_not_widen_the_type(
    tmp_path: pathlib.Path,
) -> None:
    state = as_type(as_type(state_of(tiny.GQA), np.float16), np.float16, np.float32)
    assert open_checkpoint(tiny.write(tmp_path, state)).dtype == "float16"


def test_every_format_knows_the_type_of_its_tensors(tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    from flax.serialization import msgpack_serialize
    from flax.traverse_util import unflatten_dict

    state = as_type(state_of(tiny.GQA), np.float16)
    for folder in ("bin", "flax"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(tiny.GQA))
    torch.save({n: torch.tensor(x) for n, x in state.items()}, tmp_path / "bin/pytorch_model.bin")
    flax = {}
    for name, x in state.items():
        module = name.removesuffix(".weight")
        role = "embedding" if "embed" in name else "weight" if x.ndim == 1 else "kernel"
        flax[f"{module}.{role}"] = x.T if role == "kernel" else x
    (tmp_path / "flax/flax_model.msgpack").write_bytes(
        msgpack_serialize(unflatten_dict(flax, sep="."))
    )
    for folder in ("bin", "flax"):
        assert open_checkpoint(tmp_path / folder).dtype == "float16"


def test_a_number_too_large_for_the_source_type_is_an_error(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.GQA)
    writer = Writer(tmp_path, tiny.GQA, dtype="float16")
    block = model.blocks[0]
    huge = block.replace(up=block.up.replace(w=block.up.w * jnp.float32(1e9)))
    with pytest.raises(InputError, match="too large"):
        writer.put(0, huge)


def test_a_writer_stores_the_type_it_is_given(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.GQA)
    writer = Writer(tmp_path / "out", tiny.GQA, dtype="float16")
    for i, block in enumerate(model.blocks):
        writer.put(i, block)
    (tmp_path / "none").mkdir()
    writer.finish(model.non_block, tmp_path / "none")
    stored = load_file(tmp_path / "out/model.safetensors")
    expected = tiny.state_of(tiny.GQA, model)
    assert {n: x.dtype for n, x in stored.items()} == dict.fromkeys(expected, np.float16)
    for name, x in stored.items():
        np.testing.assert_array_equal(x, expected[name].astype(np.float16))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    mode = (tmp_path / "out/config.json").stat().st_mode
    assert (tmp_path / "out/model.safetensors").stat().st_mode == mode
