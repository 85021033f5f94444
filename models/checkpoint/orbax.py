"""A model's pytrees as Orbax writes them, for JAX users: read back in the shapes of `config.json`, and where a mesh wants them."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import StandardCheckpointer

from models.arch import Block, Model
from models.checkpoint.reader import ReadBlocks, abstract, read_config
from models.errors import InputError
from models.families import hf
from models.sharding import make_mesh, place, specs_on

FOLDER = "orbax"  # beside the Hugging Face checkpoint, whose config.json says what is in it


def _block(directory: pathlib.Path, i: int) -> pathlib.Path:
    return directory.absolute() / FOLDER / f"block-{i:04d}"


def save(directory: pathlib.Path, model: Model, mesh: Mesh | None = None) -> None:
    """Write `non_block` and every block, one after the other, below a checkpoint's directory: each an Orbax checkpoint of its own.

    Args:
      mesh: of several processes, which all call this: each writes what its devices hold.
    """
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute() / FOLDER / "ends", place(model.non_block, mesh))
        for i, block in enumerate(model.blocks):
            checkpointer.save(_block(directory, i), place(block, mesh))
            checkpointer.wait_until_finished()  # or several blocks were held


def _restored(path: pathlib.Path, like: Any) -> Any:
    with StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


class _Blocks(ReadBlocks):
    """The blocks that `save` wrote."""

    def __init__(self, directory: pathlib.Path, like: Sequence[Block]):
        self._directory, self._like = directory, like

    def __len__(self) -> int:
        return len(self._like)

    def read(self, i: int) -> Block:
        """Block i, each device its own part."""
        return _restored(_block(self._directory, i), self._like[i])


def load(directory: pathlib.Path, mesh: Mesh | None = None) -> Model:
    """The model that `launch.prune --output_format=orbax` wrote; its blocks are read when they are indexed, each device its own part.

    Args:
      directory: the output directory.
      mesh: matrices are split over its `model` axis, as `models.sharding.place` does; None: the first local device.
    Raises InputError where no such thing is.
    """
    config = read_config(directory)
    if not (directory / FOLDER / "ends").is_dir():
        raise InputError(f"{directory} has no {FOLDER} folder: prune with --output_format=orbax")
    arch, non_block, blocks = hf.specs(config)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    like = specs_on(
        abstract(arch, non_block, blocks, jnp.dtype(name))[1:],
        mesh or make_mesh("", 1, jax.local_devices()),
    )
    return Model(
        arch,
        _restored(directory.absolute() / FOLDER / "ends", like[0]),
        _Blocks(directory, like[1]),
    )
