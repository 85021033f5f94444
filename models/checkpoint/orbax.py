"""Orbax checkpoints of a model's pytrees, for JAX users."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import StandardCheckpointer

from models.arch import Block, Model
from models.checkpoint.blocks import ReadBlocks
from models.checkpoint.reader import abstract, read_config
from models.errors import InputError
from models.families import hf
from models.sharding import make_mesh, place, specs_on

# Folder beside the Hugging Face checkpoint, whose config.json gives the shapes.
FOLDER = "orbax"


def _non_block_path(directory: pathlib.Path) -> pathlib.Path:
    # Orbax accepts absolute paths only.
    return directory.absolute() / FOLDER / "ends"


def _block_path(directory: pathlib.Path, i: int) -> pathlib.Path:
    return directory.absolute() / FOLDER / f"block-{i:04d}"


def save(directory: pathlib.Path, model: Model, mesh: Mesh | None = None) -> None:
    """Write the parameters below a checkpoint's directory, each block an Orbax checkpoint.

    Args:
      directory: Directory of the Hugging Face checkpoint.
      model: Model, whose blocks are read one after the other.
      mesh: Mesh of several processes, which all call this; each writes what its devices hold.
    """
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(_non_block_path(directory), place(model.non_block, mesh))
        for i, block in enumerate(model.blocks):
            checkpointer.save(_block_path(directory, i), place(block, mesh))
            # Saving is asynchronous: without a wait several blocks would be in memory.
            checkpointer.wait_until_finished()


def _restore(path: pathlib.Path, like: Any) -> Any:
    with StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


class _OrbaxBlocks(ReadBlocks):
    """Blocks that `save` wrote, each read when it is indexed."""

    def __init__(self, directory: pathlib.Path, like: Sequence[Block]):
        self._directory = directory
        self._like = like

    def __len__(self) -> int:
        return len(self._like)

    def read(self, i: int) -> Block:
        """Read block i, each device its own part.

        Args:
          i: Index of the block.

        Returns:
          Parameters of the block, on the mesh.
        """
        return _restore(_block_path(self._directory, i), self._like[i])


def load(directory: pathlib.Path, mesh: Mesh | None = None) -> Model:
    """Open the Orbax checkpoint that a pruning run wrote.

    Args:
      directory: Output directory of the run.
      mesh: Mesh, matrices are split over its `model` axis as by `models.sharding.place`; None for
        the first local device.

    Returns:
      Model whose blocks are read when they are indexed, each device its own part.

    Raises:
      InputError: The directory holds no Orbax checkpoint.
    """
    config = read_config(directory)
    if not _non_block_path(directory).is_dir():
        raise InputError(f"{directory} has no {FOLDER} folder", "prune with `output_format`=orbax")
    arch, non_block, blocks = hf.specs(config)
    # transformers 5 writes `dtype`, transformers 4 `torch_dtype`.
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    shapes = abstract(arch, non_block, blocks, jnp.dtype(name))
    mesh = mesh or make_mesh("", 1, jax.local_devices())
    return Model(
        arch,
        _restore(_non_block_path(directory), specs_on(shapes.non_block, mesh)),
        _OrbaxBlocks(directory, specs_on(shapes.blocks, mesh)),
    )
