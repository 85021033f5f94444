"""GGUF files of pruned checkpoints, for llama.cpp and what is built on it.

All forms of the LLaMA family are `llama` there, Qwen2's own is `qwen2`, and blocks that differ in
width or lost their attention are `deci`. The differences to the Hugging Face checkpoint are those
that `models.checkpoint.gguf` undoes. One tensor is in memory at a time.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np

from models import decoder, decoder_config
from models.checkpoint.formats import open_tensors
from models.checkpoint.gguf import gguf_tokenizer
from models.checkpoint.gguf_names import BLOCK, NON_BLOCK, RAGGED, ROPE_FACTORS
from models.checkpoint.gguf_writer_vocab import load_backend, vocab_metadata
from models.checkpoint.reader import read_config
from models.checkpoint.tensors import Tensors
from models.errors import InputError
from models.families import hf
from models.families.fields import Fields, kind_of
from models.layers import Linear
from models.rotary import Rope, inverse_frequencies

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Name of a type of matrices -> its GGML name; vectors are always float32.
TYPES = {"f16": "F16", "q8_0": "Q8_0"}
_PARTS = {module: part for names in (BLOCK, NON_BLOCK) for part, module in names.items()}


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


class _BlockPlan(NamedTuple):
    """A block to write: its index and specs in the checkpoint, and its sizes, 0 for no heads."""

    specs: decoder.Block
    heads: int
    kv_heads: int
    neurons: int


class _TensorPlan(NamedTuple):
    """A tensor to write: its name in the checkpoint, and the size of rotary heads to reorder."""

    source: str
    shape: tuple[int, ...]
    rotary: int


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
        raise _unwritable("needs the gguf package", "pip install gguf") from None
    _llama_config(config)
    backend = gguf_tokenizer(source) if source.is_file() else load_backend(source)
    vocab_metadata(source, backend, config)


def _unwritable(reason: str, remedy: str = "leave `output_format` out") -> InputError:
    return InputError(reason, remedy, field="output_format", value="gguf")


def _llama_config(config: Mapping[str, Any]) -> decoder_config.Config:
    """Return the settings of a model of the LLaMA family; InputError if llama.cpp lacks it."""
    c = hf.family(config).arch(config).config
    if not isinstance(c, decoder_config.Config):
        raise _unwritable(f"is not possible: llama.cpp has no architecture for {kind_of(config)}")
    if c.act != "silu":
        raise _unwritable(f"is not possible: llama.cpp's LLaMA computes silu, not {c.act}")
    # LLaMA's own settings leave all switches of the decoder at their defaults.
    if c != decoder_config.as_llama(c):
        raise _unwritable(
            f"is not possible: Topiary writes no GGUF of {kind_of(config)} models yet"
        )
    return c


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
    from gguf import GGUFWriter

    directory = pathlib.Path(directory)
    config = read_config(directory)
    c = _llama_config(config)
    tensors = open_tensors(directory)
    # Any: trees of specs of the LLaMA family, which was checked.
    non_block, specs = cast(Any, hf.specs(config)[1:])
    blocks = _plan_blocks(c, specs, tensors)
    architecture = _architecture(config, c, blocks)
    plans = _plan_tensors(c, non_block, blocks, architecture, tensors)
    metadata = vocab_metadata(directory, load_backend(directory), config)
    path = directory / f"model-{dtype}.gguf"
    with contextlib.closing(GGUFWriter(path, architecture)) as writer:
        context = _add_settings(writer, config, c, blocks, dtype)
        _add_metadata(writer, metadata)
        _write_tensors(writer, plans, tensors, dtype, _rope_factors(c.rope, c.head_dim))
    return WrittenGguf(path, architecture, context, path.stat().st_size)


def _plan_blocks(
    c: decoder_config.Config, specs: Sequence[decoder.Block], tensors: Tensors
) -> list[_BlockPlan]:
    """Return the blocks that do something, without heads where attention does nothing."""
    plans = []
    counts = c.widths or ((c.kv_heads, c.ffn_dim),) * len(specs)
    for block, (kv_heads, neurons) in zip(specs, counts, strict=True):
        # Our own form stores a part that lost all units as one unit of zeros.
        own = bool(c.widths)
        empty_attention = own and kv_heads == 1 and _does_nothing(block.o, tensors)
        empty_ffn = own and neurons == 1 and _does_nothing(block.down, tensors)
        if empty_attention and empty_ffn:
            continue
        kv_heads = 0 if empty_attention else kv_heads
        plans.append(_BlockPlan(block, kv_heads * c.query_heads // c.kv_heads, kv_heads, neurons))
    if not plans:
        raise _unwritable("is not possible: no block of the model is left")
    if not plans[0].heads:
        # llama.cpp takes the size of heads from the first block only if that has some.
        plans[0] = plans[0]._replace(heads=c.query_heads // c.kv_heads, kv_heads=1)
    return plans


def _does_nothing(linear: Linear, tensors: Tensors) -> bool:
    """Return True if a linear maps everything to zero."""
    return all(_is_zero(spec, tensors) for spec in _leaves(linear))


def _is_zero(spec: Any, tensors: Tensors) -> bool:
    return not np.asarray(tensors.read(spec.name), np.float32).any()


def _architecture(
    config: Mapping[str, Any], c: decoder_config.Config, blocks: Sequence[_BlockPlan]
) -> str:
    """Return llama.cpp's name of the architecture."""
    if len({(b.heads, b.kv_heads, b.neurons) for b in blocks}) > 1:
        return RAGGED
    # llama.cpp's Qwen2 has all heads, and biases on queries, keys and values alone.
    whole = blocks[0].heads * c.head_dim == c.dim
    if kind_of(config) == "qwen2" and whole and set(c.biases) == {"q", "k", "v"}:
        return "qwen2"
    return "llama"


def _plan_tensors(
    c: decoder_config.Config,
    non_block: decoder.NonBlockParams,
    blocks: Sequence[_BlockPlan],
    architecture: str,
    tensors: Tensors,
) -> dict[str, _TensorPlan]:
    """Return what to write under each of llama.cpp's names."""
    plans = {}
    for spec in _leaves(non_block):
        module, _, kind = spec.name.rpartition(".")
        plans[f"{_PARTS[module]}.{kind}"] = _TensorPlan(spec.name, spec.shape, 0)
    for i, block in enumerate(blocks):
        for spec in _leaves(block.specs):
            module, _, kind = spec.name.rpartition(".")
            part = _PARTS[module.split(".", 3)[3]]
            # Stock forms fill missing biases with zeros, which llama.cpp does without.
            skipped = kind == "bias" and _is_zero(spec, tensors)
            if skipped or (part.startswith("attn_") and not block.heads):
                continue
            # llama.cpp rotates neighbouring rows of LLaMA, and halves of Qwen2's as transformers.
            rotates = part in ("attn_q", "attn_k") and architecture != "qwen2"
            plans[f"blk.{i}.{part}.{kind}"] = _TensorPlan(
                spec.name, spec.shape, c.head_dim if rotates else 0
            )
    return plans


def _leaves(tree: Any) -> list[hf.Spec]:
    return jax.tree.leaves(tree, is_leaf=hf.is_spec)


def _add_settings(
    writer: "GGUFWriter",
    config: Mapping[str, Any],
    c: decoder_config.Config,
    blocks: Sequence[_BlockPlan],
    dtype: str,
) -> int:
    """Add the architecture's settings to a file; return the longest text in tokens."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    context = Fields(config).count("max_position_embeddings", 2048)
    # llama.cpp's LLaMA has neither windows nor dynamic scaling. Up to a window's length, and to
    # the positions where dynamic scaling begins, the function is the same.
    context = min([context, *(w for w in c.windows if w is not None)])
    ragged = len({b[1:] for b in blocks}) > 1

    def counts(name: str) -> Any:
        values = [getattr(b, name) for b in blocks]
        return values if ragged else values[0]

    writer.add_file_type(LlamaFileType[f"MOSTLY_{TYPES[dtype]}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab)
    writer.add_context_length(context)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(len(blocks))
    writer.add_feed_forward_length(counts("neurons"))
    writer.add_head_count(counts("heads"))
    writer.add_head_count_kv(counts("kv_heads"))
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.static.eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope.theta)
    if c.rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope.factor)
    return context


def _add_metadata(writer: "GGUFWriter", metadata: Mapping[str, Any]) -> None:
    """Add the tokenizer's metadata to a file."""
    for key, value in metadata.items():
        # bool before int, which it also is.
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _rope_factors(rope: Rope, head_dim: int) -> np.ndarray | None:
    """Return what divides the rotary frequencies, float32 [d/2]; None where nothing does."""
    if rope.kind != "llama3":
        return None
    plain = inverse_frequencies(dataclasses.replace(rope, kind="default"), head_dim, 1)
    return plain / inverse_frequencies(rope, head_dim, 1)


def _write_tensors(
    writer: "GGUFWriter",
    plans: Mapping[str, _TensorPlan],
    tensors: Tensors,
    dtype: str,
    rope_factors: np.ndarray | None,
) -> None:
    """Write the header, which names every tensor, and then one tensor after the other."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = {name: GGMLQuantizationType[_stored_type(p.shape, dtype)] for name, p in plans.items()}
    for name, plan in plans.items():
        block, block_bytes = GGML_QUANT_SIZES[kinds[name]]
        size = math.prod(plan.shape) // block * block_bytes
        writer.add_tensor_info(name, plan.shape, np.dtype(np.float32), size, kinds[name])
    if rope_factors is not None:
        writer.add_tensor_info(
            ROPE_FACTORS, rope_factors.shape, rope_factors.dtype, rope_factors.nbytes
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value in _encoded(plans, kinds, tensors):
        writer.write_tensor_data(value)
    if rope_factors is not None:
        writer.write_tensor_data(rope_factors)


def _stored_type(shape: Sequence[int], dtype: str) -> str:
    """Return the GGML type of a tensor: float32 for vectors, float16 for rows of odd length."""
    if len(shape) == 1:
        return "F32"
    return "F16" if shape[-1] % 32 else TYPES[dtype]


def _encoded(
    plans: Mapping[str, _TensorPlan], kinds: Mapping[str, Any], tensors: Tensors
) -> Iterator[np.ndarray]:
    """Yield every tensor as its bytes lie in the file."""
    from gguf.quants import quantize

    for name, plan in plans.items():
        value = np.asarray(tensors.read(plan.source), np.float32)
        if plan.rotary:
            # From halves (i, i + d/2) of each head to neighbours (2i, 2i + 1).
            halves = value.reshape(-1, 2, plan.rotary // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        with np.errstate(over="ignore"):
            stored = quantize(np.ascontiguousarray(value), kinds[name])
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise _unwritable(f"is not possible: {plan.source} exceeds float16's range")
        yield stored
