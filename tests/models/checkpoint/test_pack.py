"""A packed checkpoint opens as the dense one, and unpacks to its bytes."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models.arch import Model
from models.checkpoint.pack import pack, unpack
from models.checkpoint.pack_formats import PACKINGS
from models.checkpoint.reader import in_memory, open_checkpoint
from models.errors import InputError
from reference import tiny, tiny_tokenizer

SHARD = 20_000  # bytes, so that the model takes several files


def half_zero(config: Any) -> Model:
    """Return a random model whose matrices have every other input zero."""
    model = tiny.random_model(config)
    slots = [s.name for s in model.arch.slots]

    def thin(block: Any) -> Any:
        changes = {}
        for name in slots:
            linear = getattr(block, name)
            changes[name] = linear.replace(w=linear.w.at[:, ::2].set(0))
        return block.replace(**changes)

    return model._replace(blocks=tuple(thin(b) for b in model.blocks))


def written(
    directory: pathlib.Path, config: Any = tiny.BIASED, shard_bytes: int = SHARD, dtype: Any = None
) -> pathlib.Path:
    model = half_zero(config)
    if dtype is not None:
        parts = jax.tree.map(lambda x: x.astype(dtype), (model.non_block, model.blocks))
        model = Model(model.arch, *parts)
    tiny.written(directory, model, config, shard_bytes)
    tiny_tokenizer.write(directory)
    return directory


@pytest.mark.parametrize("config", [tiny.BIASED, tiny.OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("shard_bytes", [SHARD, 1 << 30], ids=["shards", "one file"])
@pytest.mark.parametrize("name", PACKINGS)
def test_a_pack_reads_and_unpacks_to_the_bit(
    name: str, shard_bytes: int, config: Any, tmp_path: pathlib.Path
) -> None:
    directory = written(tmp_path / "out", config, shard_bytes, jnp.bfloat16)
    sizes = pack(directory, name)
    assert sizes.dense == sum(f.stat().st_size for f in directory.glob("model*.safetensors"))
    assert sizes.packed == sum(f.stat().st_size for f in directory.glob("packed/*.safetensors"))
    dense = open_checkpoint(directory, jnp.bfloat16)
    packed = open_checkpoint(directory / "packed", jnp.bfloat16)
    tiny.assert_equal(in_memory(packed.model), in_memory(dense.model))
    assert packed.stored_bytes == sizes.packed
    unpack(directory / "packed", tmp_path / "again")
    files = {f.name: f.read_bytes() for f in directory.iterdir() if f.is_file()}
    again = {f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()}
    assert again == files and any(n.endswith("index.json") for n in files) == (shard_bytes == SHARD)
    written_files = [*(directory / "packed").iterdir(), *(tmp_path / "again").iterdir()]
    assert {f.stat().st_mode for f in written_files} == {(directory / "config.json").stat().st_mode}


def test_a_pack_has_what_macko_s_script_expects(tmp_path: pathlib.Path) -> None:
    """Parts c_0 to c_2 in place of every block's matrices, all else as it was."""
    directory = written(tmp_path / "out", shard_bytes=1 << 30, dtype=jnp.float16)
    pack(directory, "macko")
    dense = load_file(directory / "model.safetensors")
    packed = load_file(directory / "packed/packed.safetensors")
    linears = {n for n, x in dense.items() if x.ndim == 2 and "layers" in n}
    parts = {n.removesuffix("weight") + f"c_{k}" for n in linears for k in range(3)}
    assert packed.keys() == (dense.keys() - linears) | parts
    up = "model.layers.1.mlp.up_proj."
    for k, part in enumerate(PACKINGS["macko"].pack(dense[up + "weight"])):
        np.testing.assert_array_equal(packed[f"{up}c_{k}"], part)
    with safe_open(directory / "packed/packed.safetensors", "np") as file:
        shapes = json.loads(file.metadata()["shapes"])
    assert shapes[up + "weight"] == list(dense[up + "weight"].shape)


def test_a_bitmask_leaves_matrices_alone_that_would_grow(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.GQA)
    tiny.written(tmp_path / "out", model, tiny.GQA)
    sizes = pack(tmp_path / "out", "bitmask")
    assert (sizes.linears_dense, sizes.linears_packed) == (0, 0)
    tiny.assert_equal(in_memory(open_checkpoint(tmp_path / "out/packed").model), model)


def test_what_is_no_pack_is_refused(tmp_path: pathlib.Path) -> None:
    directory = written(tmp_path / "out", shard_bytes=1 << 30)
    pack(directory, "bitmask")
    with pytest.raises(InputError, match="pack=zip is no packing: choose of bitmask, macko"):
        pack(directory, "zip")
    with pytest.raises(InputError, match="packed exists already"):
        pack(directory, "bitmask")
    with pytest.raises(InputError, match=r"out has no packed\.safetensors"):
        unpack(directory, tmp_path / "again")
    file = directory / "packed/packed.safetensors"
    tensors = load_file(file)
    with safe_open(file, "np") as source:
        header = source.metadata()
    damage: list[tuple[dict[str, str], str]] = [
        ({}, "packed.safetensors is damaged or not complete .*header"),
        (header | {"packing": "zip"}, "header"),
        (header | {"shapes": "[1"}, "header"),
        (header | {"shapes": '{"model.layers.0.mlp.up_proj.weight": [1]}'}, "header"),
        (header | {"shapes": '{"absent.weight": [1, 1]}'}, "header"),
    ]
    for metadata, says in damage:
        save_file(tensors, file, metadata=metadata or None)
        with pytest.raises(InputError, match=says):
            open_checkpoint(directory / "packed")
    shapes = json.loads(header["shapes"])
    for name in ("values", "bitmask"):
        changed = dict(tensors)
        full = f"model.layers.0.mlp.up_proj.{name}"
        changed[full] = changed[full][:-1]
        save_file(changed, file, metadata=header)
        with pytest.raises(InputError, match=r"up_proj\.weight: .*pack the model again"):
            in_memory(open_checkpoint(directory / "packed").model)
    assert shapes
