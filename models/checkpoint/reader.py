"""Checkpoints read block by block, so that no more than the requested block is in memory."""

import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.arch import Arch, Block, Model, NonBlockParams
from models.checkpoint.blocks import LazyBlocks, fetch, put_on_devices
from models.checkpoint.formats import open_tensors, weight_files
from models.checkpoint.fused import Split, stored_name, stored_shapes
from models.checkpoint.stored import HEAD, exact_dtype, settle_head, text_part, with_prefix
from models.checkpoint.tensors import Tensors
from models.errors import InputError
from models.families import hf
from models.precision import check_single_precision
from models.untrusted import UserFile

# Buffers that some exporters stored beside the weights; they follow from the configuration.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
# Beginnings of the names of a language model's own tensors.
OWN_MODULES = ("model.", "lm_head.")
_BLOCK_NAME = re.compile(r"\blayers\.(\d+)\.")


class Checkpoint(NamedTuple):
    """A model opened for reading.

    Attributes:
      model: Model whose blocks are read each time they are indexed.
      config: Contents of `config.json`.
      specs: Specs of each block's arrays.
      directory: Checkpoint directory or `.gguf` file, where the tokenizer is.
      parameters: Number of entries of the model's arrays.
      stored_bytes: Size of the weight files in bytes.
      dtype: Narrowest type that holds every stored parameter exactly.
      remarks: Sentences that the report's reader must see.
    """

    model: Model
    config: dict[str, Any]
    specs: tuple[Block, ...]
    directory: pathlib.Path
    parameters: int
    stored_bytes: int
    dtype: str = "float32"
    remarks: tuple[str, ...] = ()


def _first_names(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_blocks(tensors: Tensors, blocks: int) -> None:
    """Check that a checkpoint has as many blocks as its configuration names.

    Args:
      tensors: Tensors of the checkpoint.
      blocks: Number of blocks in the configuration.

    Raises:
      InputError: It has fewer; `check` finds surplus ones.
    """
    matches = (_BLOCK_NAME.search(name) for name in tensors.shapes)
    stored = {match[1] for match in matches if match}
    if blocks > len(stored):
        raise InputError(
            f"config.json: num_hidden_layers={blocks}, but the weights hold {len(stored)} blocks",
            "they belong to different models",
        )


def check(tensors: Tensors, wanted: Mapping[str, tuple[int, ...]], tied: bool) -> tuple[str, ...]:
    """Check that a checkpoint has the tensors of its configuration.

    Args:
      tensors: Tensors of the checkpoint.
      wanted: Shape of each tensor that the configuration calls for.
      tied: True if the embedding serves as the head.

    Returns:
      Remarks about tensors that are left out.

    Raises:
      InputError: A tensor of the model is missing, surplus or of another shape.
    """
    missing = [n for n in wanted if n not in tensors.shapes]
    if missing:
        raise InputError(
            f"the checkpoint lacks {_first_names(missing)}",
            "fetch it again, or check that config.json belongs to it",
        )
    for name, shape in wanted.items():
        if tuple(tensors.shapes[name]) != shape:
            raise InputError(
                f"tensor {name} has shape {list(tensors.shapes[name])}, config.json says "
                f"{list(shape)}",
                "they belong to different models",
            )
    # A tied head that is stored too is a copy of the embedding.
    ignored = {HEAD} if tied else set()
    surplus = [
        n
        for n in tensors.shapes
        if n not in wanted and n not in ignored and not n.endswith(IGNORED_SUFFIXES)
    ]
    own = [n for n in surplus if n.startswith(OWN_MODULES)]
    if own:
        raise InputError(
            f"the checkpoint holds {_first_names(own)}, which config.json does not account for",
            "they belong to different models",
        )
    if not surplus:
        return ()
    # Trainers store heads of their own beside the model; transformers leaves them out too.
    return (
        f"{_first_names(surplus)} of the checkpoint are no part of a language model: they were "
        "left out",
    )


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint directory.

    Args:
      directory: Checkpoint directory.

    Returns:
      Contents of `config.json`; the text part's of a model that sees images too.

    Raises:
      InputError: The file is missing, cannot be read or is no JSON object.
    """
    path = directory / "config.json"
    if not os.path.exists(path) and os.access(directory, os.X_OK):
        # The usual cause is a path one level too high or too low.
        raise InputError(
            f"{directory} has no config.json",
            "`model` must name a Hugging Face checkpoint directory",
        )
    return hf.text_config(UserFile(path).read_json())


def open_checkpoint(path: pathlib.Path, dtype: jnp.dtype = jnp.float32) -> Checkpoint:
    """Open a checkpoint, checking every name and shape before any weight is read.

    Args:
      path: Directory or `.gguf` file, as `models.checkpoint.hub.resolve` returns it.
      dtype: Type of the parameters in memory, whatever is stored.

    Returns:
      Checkpoint.

    Raises:
      InputError: Something is missing, surplus, of another shape, damaged or not supported; or JAX
        computes in 64 bits.
    """
    check_single_precision()
    if path.suffix == ".gguf":
        # Imported on demand: it needs an optional package.
        from models.checkpoint.gguf import open_gguf

        config, tensors = open_gguf(path)
        directory = path.parent
    else:
        config, tensors, directory = read_config(path), None, path
    arch, non_block, blocks = hf.specs(config)
    tensors = open_tensors(directory) if tensors is None else tensors
    tensors, remarks = text_part(tensors)
    # Some OPT and LLaMA checkpoints hold the bare decoder.
    tensors = with_prefix(tensors, [stored_name(s.name) for s in _leaves((non_block, blocks))])
    check_blocks(tensors, len(blocks))
    if arch.config.tied:
        config, tensors, about_head = settle_head(config, tensors, non_block.embed.name)
        remarks += about_head
        arch, non_block, blocks = hf.specs(config)
    leaves = _leaves((non_block, blocks))
    # Before any data is read, so that a wrong checkpoint fails at once.
    shapes = {s.name: s.shape for s in leaves}
    remarks += check(tensors, stored_shapes(shapes), arch.config.tied)
    tensors = Split(tensors, shapes)
    model = Model(
        arch, put_on_devices(fetch(tensors, non_block), dtype), LazyBlocks(tensors, blocks, dtype)
    )
    return Checkpoint(
        model,
        config,
        blocks,
        path,
        parameters=sum(math.prod(s.shape) for s in leaves),
        stored_bytes=sum(f.stat().st_size for f in weight_files(path)),
        dtype=exact_dtype(tensors, [s.name for s in leaves]),
        remarks=remarks,
    )


def _leaves(specs: Any) -> list[hf.Spec]:
    return jax.tree.leaves(specs, is_leaf=hf.is_spec)


def in_memory(model: Model) -> Model:
    """Read all blocks of a model.

    Args:
      model: Model.

    Returns:
      Model whose blocks are a tuple.
    """
    return model._replace(blocks=tuple(model.blocks))


def abstract(
    arch: Arch, non_block: NonBlockParams, blocks: Sequence[Block], dtype: jnp.dtype = jnp.float32
) -> Model:
    """Make a model of shapes alone, for `jax.eval_shape` and compilation without weights.

    Args:
      arch: Architecture.
      non_block: Specs of the parameters outside the blocks.
      blocks: Specs of each block.
      dtype: Type of the parameters.

    Returns:
      Model with jax.ShapeDtypeStruct in place of every array.
    """

    def shape(tree: Any) -> Any:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, dtype), tree, is_leaf=hf.is_spec
        )

    return Model(arch, shape(non_block), tuple(shape(b) for b in blocks))
