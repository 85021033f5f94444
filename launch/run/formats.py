"""Write a finished checkpoint in further formats beside the Hugging Face files, and check them."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from launch.run import export
from launch.run.job import Output
from models.checkpoint.formats import open_tensors
from models.checkpoint.pack import FOLDER, pack
from models.checkpoint.reader import Checkpoint, open_checkpoint
from models.errors import InputError, first_line
from models.processes import run_on_primary


def check_formats(output: Output, checkpoint: Checkpoint) -> None:
    """Check before any work that the formats asked for can hold the model.

    Args:
      output: What to write.
      checkpoint: The dense checkpoint.

    Raises:
      InputError: A format cannot hold it.
    """
    if output.format == "gguf":
        # Imported on demand: it needs an optional package.
        from models.checkpoint.gguf_writer import check_gguf

        check_gguf(checkpoint.config, checkpoint.directory)


def write_formats(
    directory: pathlib.Path,
    output: Output,
    written: export.Written,
    check: export.RoundTripCheck,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """Write the formats that a run asks for.

    Args:
      directory: Directory of the written checkpoint.
      output: What to write.
      written: The checkpoint as it loads.
      check: Check that has seen all pruned blocks.
      mesh: Devices of the run; None: one.

    Returns:
      The report's `other_formats`: by format, its files, sizes in bytes and how they read back.

    Raises:
      RuntimeError: A format does not read back as it was written.
    """
    if output.format == "orbax":
        from models.checkpoint import orbax as pytrees  # orbax imports slowly, and few runs use it

        # The type that config.json names, in which they are read back. Each process writes what
        # its devices hold.
        stored = jnp.dtype(written.loaded.config["dtype"])
        pytrees.save(directory, open_checkpoint(directory, stored).model, mesh)
    formats = {}
    if output.format == "gguf":
        dtype = written.loaded.model.non_block.embed.dtype
        formats["gguf"] = run_on_primary(
            lambda: _write_gguf(directory, output.gguf_type, check, dtype)
        )
    if output.pack != "none":
        formats["pack"] = run_on_primary(lambda: _write_pack(directory, output.pack))
    return formats


def _write_gguf(
    directory: pathlib.Path, stored: str, check: export.RoundTripCheck, dtype: jnp.dtype
) -> dict[str, Any]:
    """Write a GGUF file and compare its logits with those of the pruned model, of type `dtype`."""
    from models.checkpoint.gguf_writer import write_gguf

    file = write_gguf(directory, stored)
    record = {
        "file": file.path.name,
        "type": stored,
        "architecture": file.architecture,
        "context": file.context,
        "bytes": file.size,
    }
    try:
        loaded = open_checkpoint(file.path, dtype).model
    except InputError as e:
        # llama.cpp reads some rotary scalings that our reader does not.
        return record | {"load_back": f"not checked: {first_line(e)}"}
    difference = check.difference(loaded, file.context)
    if stored == "f16" and difference > export.TOLERANCE_LOW_PRECISION:
        raise RuntimeError(
            f"the GGUF file gives other logits than the pruned model (they differ by "
            f"{difference:.3g}); --output was not touched"
        )
    return record | {"load_back": f"largest difference of the logits {difference:.2g}"}


def _write_pack(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """Write the weights without zeros and compare every tensor, to the bit."""
    sizes = pack(directory, name)
    dense, packed = open_tensors(directory), open_tensors(directory / FOLDER)
    for tensor in dense.shapes:
        wanted, read = dense.read(tensor), packed.read(tensor)
        if read.dtype != wanted.dtype or not np.array_equal(
            read.view(np.uint8), wanted.view(np.uint8)
        ):
            raise RuntimeError(f"{tensor} is not packed to the bit; --output was not touched")
    return {"format": name, "folder": FOLDER, **sizes._asdict()}


def warnings(formats: Mapping[str, Any], config: Mapping[str, Any], dtype: str) -> Iterator[str]:
    """Yield what a reader of the report must know about the other formats, one clause each.

    Args:
      formats: The report's `other_formats`.
      config: Contents of the written `config.json`.
      dtype: Type of the weights.
    """
    gguf, packed = formats.get("gguf"), formats.get("pack")
    if gguf and gguf["context"] < config.get("max_position_embeddings", 0):
        yield (
            f"the GGUF file is for texts of at most {gguf['context']} tokens, the length of the "
            "model's attention window, which llama.cpp does not have"
        )
    if packed and packed["packed"] >= packed["dense"]:
        yield (
            f"the {packed['format']} pack is no smaller than the dense weights: too few of them "
            "are zero"
        )
    if packed and packed["format"] == "macko" and dtype != "float16":
        yield f"MACKO's kernels compute in float16, and this pack holds {dtype}"
