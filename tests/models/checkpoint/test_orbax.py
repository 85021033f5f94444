"""Orbax checkpoints are restored bit for bit, on one device or many, in any shapes."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from models.checkpoint import orbax as pytrees
from models.checkpoint.reader import in_memory, open_checkpoint
from models.errors import InputError
from models.sharding import make_mesh, place
from reference import tiny


@pytest.mark.parametrize("mesh", ["", "data=2,model=2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gqa", "opt", "biased"])
def test_a_model_is_restored_bit_for_bit(
    family: str, dtype: str, mesh: str, tmp_path: pathlib.Path
) -> None:
    config = tiny.FAMILIES[family]
    directory = tiny.write(
        tmp_path, tiny.state_of(config, tiny.random_model(config)), {**config, "dtype": dtype}
    )
    model = open_checkpoint(directory, jnp.dtype(dtype)).model
    pytrees.save(directory, model)
    m = make_mesh(mesh) if mesh else None
    found = pytrees.load(directory, m)
    tiny.assert_equal(in_memory(found), in_memory(model))
    for got, wanted in zip(
        jax.tree.leaves(found.blocks[-1]), jax.tree.leaves(place(model.blocks[-1], m)), strict=True
    ):
        assert got.dtype == dtype and got.sharding.is_equivalent_to(wanted.sharding, got.ndim)
    assert len(found.blocks[1:]) == len(model.blocks) - 1
    with pytest.raises(IndexError):
        found.blocks[len(model.blocks)]


def test_a_checkpoint_without_orbax_files_is_refused(tmp_path: pathlib.Path) -> None:
    config = tiny.GQA
    directory = tiny.write(tmp_path, tiny.state_of(config, tiny.random_model(config)), config)
    with pytest.raises(InputError, match="prune with output_format=orbax"):
        pytrees.load(directory)
