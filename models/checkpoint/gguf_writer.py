"""GGUF files of pruned checkpoints, for llama.cpp and what is built on it.

The differences to the Hugging Face checkpoint are those that `models.checkpoint.gguf` undoes. One
tensor is in memory at a time.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from models.checkpoint.formats import open_tensors
from models.checkpoint.fused import Split
from models.checkpoint.gguf import gguf_tokenizer
from models.checkpoint.gguf_names import ARCHITECTURES
from models.checkpoint.gguf_writer_plan import (
    TensorPlan,
    check_model,
    leaves,
    model_settings,
    plan_blocks,
    plan_tensors,
    sizes_of,
    unwritable,
)
from models.checkpoint.gguf_writer_settings import (
    factor_tensors,
    longest_text,
    settings_of,
)
from models.checkpoint.gguf_writer_vocab import load_backend, vocab_metadata
from models.checkpoint.reader import read_config
from models.checkpoint.tensors import Tensors
from models.families import hf
from models.families.fields import Fields

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Name of a type of matrices -> its GGML name; vectors are always float32.
TYPES = {"f16": "F16", "q8_0": "Q8_0"}


class WrittenGguf(NamedTuple):
    """A GGUF file that was written.

    Attributes:
      path: The file.
      architecture: llama.cpp's name of the architecture.
      context: Longest text in tokens.
      size: Bytes.
    """

    path: pathlib.Path
    architecture: str
    context: int
    size: int


def check_gguf(config: Mapping[str, Any], source: pathlib.Path) -> None:
    """Check that llama.cpp has the architecture and the tokenizer of a model, before any work.

    Args:
      config: Contents of `config.json`.
      source: Checkpoint directory, or `.gguf` file.

    Raises:
      InputError: It has not, or the `gguf` package is missing.
    """
    try:
        import gguf  # noqa: F401  (fail now rather than after the run)
    except ImportError:
        raise unwritable("needs the gguf package", "pip install gguf") from None
    check_model(config)
    backend = gguf_tokenizer(source) if source.is_file() else load_backend(source)
    vocab_metadata(source, backend, config)


def write_gguf(directory: str | os.PathLike[str], dtype: str = "f16") -> WrittenGguf:
    """Write a GGUF file beside the weights of a checkpoint.

    Args:
      directory: Checkpoint directory, with its tokenizer.
      dtype: Type of the matrices, a key of TYPES; with "q8_0" matrices whose rows are no whole
        blocks of 32 stay float16.

    Returns:
      The file `model-DTYPE.gguf`.

    Raises:
      InputError: llama.cpp lacks the architecture or the tokenizer, or a weight exceeds float16.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    directory = pathlib.Path(directory)
    config = read_config(directory)
    c = model_settings(config)
    # Any: trees of specs of the decoder's families, which was checked.
    non_block, specs = cast(Any, hf.specs(config)[1:])
    # Parts of fused tensors are written one by one, each with the zeros that it lacks.
    tensors = Split(open_tensors(directory), {s.name: s.shape for s in leaves((non_block, specs))})
    blocks, architecture = plan_blocks(config, c, specs, tensors)
    arch = ARCHITECTURES[architecture]
    context = longest_text(c, arch, Fields(config).count("max_position_embeddings", 2048))
    plans = plan_tensors(arch, c, non_block, blocks, tensors)
    metadata = vocab_metadata(directory, load_backend(directory), config)
    path = directory / f"model-{dtype}.gguf"
    with contextlib.closing(GGUFWriter(path, architecture)) as writer:
        writer.add_file_type(LlamaFileType[f"MOSTLY_{TYPES[dtype]}"])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        settings = settings_of(c, arch, sizes_of(blocks), context)
        _add_metadata(writer, {f"{architecture}.{key}": v for key, v in settings.items()})
        _add_metadata(writer, metadata)
        _write_tensors(writer, plans, tensors, dtype, factor_tensors(c.rope, c.head_dim))
    return WrittenGguf(path, architecture, context, path.stat().st_size)


def _add_metadata(writer: "GGUFWriter", metadata: Mapping[str, Any]) -> None:
    """Add metadata to a file."""
    for key, value in metadata.items():
        # bool before int, which it also is.
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)


def _write_tensors(
    writer: "GGUFWriter",
    plans: Mapping[str, TensorPlan],
    tensors: Tensors,
    dtype: str,
    factors: Mapping[str, np.ndarray],
) -> None:
    """Write the header, which names every tensor, and then one tensor after the other."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = {name: GGMLQuantizationType[_stored_type(p.shape, dtype)] for name, p in plans.items()}
    for name, plan in plans.items():
        block, block_bytes = GGML_QUANT_SIZES[kinds[name]]
        size = math.prod(plan.shape) // block * block_bytes
        writer.add_tensor_info(name, plan.shape, np.dtype(np.float32), size, kinds[name])
    for name, value in factors.items():
        writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value in _encoded(plans, kinds, tensors):
        writer.write_tensor_data(value)
    for value in factors.values():
        writer.write_tensor_data(value)


def _stored_type(shape: Sequence[int], dtype: str) -> str:
    """Return the GGML type of a tensor: float32 for vectors, float16 for rows of odd length."""
    if len(shape) == 1:
        return "F32"
    return "F16" if shape[-1] % 32 else TYPES[dtype]


def _encoded(
    plans: Mapping[str, TensorPlan], kinds: Mapping[str, Any], tensors: Tensors
) -> Iterator[np.ndarray]:
    """Yield every tensor as its bytes lie in the file."""
    from gguf.quants import quantize

    for name, plan in plans.items():
        value = np.concatenate([_filled(tensors, *source) for source in plan.sources])
        value = value + np.float32(plan.offset) if plan.offset else value
        if plan.rotary:
            # From halves (i, i + d/2) of each head to neighbours (2i, 2i + 1).
            halves = value.reshape(-1, 2, plan.rotary // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        with np.errstate(over="ignore"):
            stored = quantize(np.ascontiguousarray(value), kinds[name])
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise unwritable(f"is not possible: {plan.sources[0][0]} exceeds float16's range")
        yield stored


def _filled(tensors: Tensors, name: str, shape: Sequence[int]) -> np.ndarray:
    """Read a tensor in float32, with zeros after its rows and columns up to a shape."""
    value = np.asarray(tensors.read(name), np.float32)
    return np.pad(value, [(0, n - have) for n, have in zip(shape, value.shape, strict=True)])
