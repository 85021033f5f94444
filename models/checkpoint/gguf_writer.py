"""GGUF files of pruned checkpoints, for llama.cpp and what is built on it.

All forms that compute what a LLaMA does are `llama` there, Qwen2's own is `qwen2`, and their blocks
that differ in width or lost their attention are `deci`. Other families have an architecture of
their own, whose blocks are alike. The differences to the Hugging Face checkpoint are those that
`models.checkpoint.gguf` undoes. One tensor is in memory at a time.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np

from models import decoder
from models.checkpoint.formats import open_tensors
from models.checkpoint.fused import Split
from models.checkpoint.gguf import gguf_tokenizer
from models.checkpoint.gguf_names import ARCHITECTURES, NON_BLOCK, RAGGED, Architecture
from models.checkpoint.gguf_writer_settings import (
    Sizes,
    factor_tensors,
    longest_text,
    settings_of,
    unsaid,
)
from models.checkpoint.gguf_writer_vocab import load_backend, vocab_metadata
from models.checkpoint.reader import read_config
from models.checkpoint.tensors import Tensors
from models.errors import InputError
from models.families import hf
from models.families.fields import Fields, kind_of
from models.layers import Linear

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


class _BlockPlan(NamedTuple):
    """A block to write: its index and specs in the checkpoint, and its sizes, 0 for no heads."""

    specs: decoder.Block
    heads: int
    kv_heads: int
    neurons: int


class _TensorPlan(NamedTuple):
    """A tensor to write.

    Attributes:
      sources: Names in the checkpoint of the parts that lie below each other, with the shape of
        each in the file. What a part lacks is filled with zeros.
      rotary: Size of the heads whose rows are reordered; 0 for none.
      offset: Number to add.
    """

    sources: tuple[tuple[str, tuple[int, ...]], ...]
    rotary: int = 0
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape in the file."""
        shapes = [shape for _, shape in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


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
    c = _settings(config)
    if not _is_llama(c):
        # Sizes that change in the run are checked again when the file is written.
        sizes = Sizes(len(c.windows), c.query_heads, c.kv_heads, c.ffn_dim)
        _check_said(config, c, _own(config), sizes)
    backend = gguf_tokenizer(source) if source.is_file() else load_backend(source)
    vocab_metadata(source, backend, config)


def _unwritable(reason: str, remedy: str = "leave `output_format` out") -> InputError:
    return InputError(reason, remedy, field="output_format", value="gguf")


def _settings(config: Mapping[str, Any]) -> decoder.Config:
    """Return the settings of a model; InputError if llama.cpp lacks it at any sizes."""
    c = hf.family(config).arch(config).config
    if not isinstance(c, decoder.Config) or not (_is_llama(c) or _own(config)):
        raise _unwritable(f"is not possible: llama.cpp has no architecture for {kind_of(config)}")
    if _is_llama(c) and c.act != "silu":
        raise _unwritable(f"is not possible: llama.cpp's LLaMA computes silu, not {c.act}")
    if c.rope.kind == "yarn" and not c.rope.truncate:
        raise _unwritable("is not possible: llama.cpp rounds the bounds of yarn's ramp")
    return c


def _is_llama(c: decoder.Config) -> bool:
    # LLaMA's own settings leave all switches of the decoder at their defaults.
    return c == decoder.as_llama(c) and c.rope.share == 1.0


def _own(config: Mapping[str, Any]) -> str:
    """Return the architecture of a family that is no LLaMA; empty if there is none."""
    kind = kind_of(config)
    # Mistral has none of its own.
    kind = "llama" if kind == "mistral" else kind
    return next((name for name, arch in ARCHITECTURES.items() if arch.model_type == kind), "")


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
    c = _settings(config)
    # Any: trees of specs of the decoder's families, which was checked.
    non_block, specs = cast(Any, hf.specs(config)[1:])
    # Parts of fused tensors are written one by one, each with the zeros that it lacks.
    tensors = Split(open_tensors(directory), {s.name: s.shape for s in _leaves((non_block, specs))})
    blocks, architecture = _plan_blocks(config, c, specs, tensors)
    arch = ARCHITECTURES[architecture]
    context = longest_text(c, arch, Fields(config).count("max_position_embeddings", 2048))
    plans = _plan_tensors(arch, c, non_block, blocks, tensors)
    metadata = vocab_metadata(directory, load_backend(directory), config)
    path = directory / f"model-{dtype}.gguf"
    with contextlib.closing(GGUFWriter(path, architecture)) as writer:
        writer.add_file_type(LlamaFileType[f"MOSTLY_{TYPES[dtype]}"])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        settings = settings_of(c, arch, _sizes(blocks), context)
        _add_metadata(writer, {f"{architecture}.{key}": v for key, v in settings.items()})
        _add_metadata(writer, metadata)
        _write_tensors(writer, plans, tensors, dtype, factor_tensors(c.rope, c.head_dim))
    return WrittenGguf(path, architecture, context, path.stat().st_size)


def _plan_blocks(
    config: Mapping[str, Any], c: decoder.Config, specs: Sequence[decoder.Block], tensors: Tensors
) -> tuple[list[_BlockPlan], str]:
    """Return the blocks to write, and the architecture of the file."""
    counts = c.widths or ((c.kv_heads, c.ffn_dim),) * len(specs)
    if not _is_llama(c):
        architecture = _own(config)
        size = _common_size(c, ARCHITECTURES[architecture], counts)
        plans = [_BlockPlan(block, *size) for block in specs]
        _check_said(config, c, architecture, _sizes(plans))
        return plans, architecture
    plans = _llama_blocks(c, specs, counts, tensors)
    return plans, _llama_architecture(config, c, plans)


def _check_said(
    config: Mapping[str, Any], c: decoder.Config, architecture: str, sizes: Sizes
) -> None:
    """Check that the settings of a file of blocks that are alike say all of the model."""
    flagged = {slot for slots in hf.family(config).bias_flags.values() for slot in slots}
    held = flagged | _stock_biases(config)
    if surplus := [slot for slot in c.biases if slot not in held]:
        raise _unwritable(
            f"is not possible: llama.cpp's {architecture} has no biases of {', '.join(surplus)}"
        )
    positions = Fields(config).count("max_position_embeddings", 2048)
    context = longest_text(c, ARCHITECTURES[architecture], positions)
    if missing := unsaid(c, architecture, sizes, context):
        raise _unwritable(
            f"is not possible: llama.cpp's {architecture} has no setting for this model's "
            f"{', '.join(missing)}"
        )


def _sizes(blocks: Sequence[_BlockPlan]) -> Sizes:
    """Return the sizes of all blocks, as one number where they are alike."""
    columns = [list(column) for column in zip(*(b[1:] for b in blocks), strict=True)]
    if all(len(set(column)) == 1 for column in columns):
        return Sizes(len(blocks), *(column[0] for column in columns))
    return Sizes(len(blocks), *columns)


def _common_size(
    c: decoder.Config, arch: Architecture, counts: Sequence[tuple[int, int]]
) -> tuple[int, int, int]:
    """Return query heads, key-value heads and neurons that every block fits in."""
    kv_heads, neurons = map(max, zip(*counts, strict=True))
    shared = c.query_heads // c.kv_heads
    if arch.whole_heads:
        kv_heads = max(kv_heads, c.dim // (shared * c.head_dim))
    # Zeros beside the heads would change the mean square that the norm divides by.
    grows = c.qk_norm == "whole" and any(k != kv_heads for k, _ in counts)
    if grows or (arch.whole_heads and kv_heads * shared * c.head_dim != c.dim):
        raise _unwritable("is not possible: llama.cpp takes only heads that make up the width")
    return kv_heads * shared, kv_heads, neurons


def _llama_blocks(
    c: decoder.Config,
    specs: Sequence[decoder.Block],
    counts: Sequence[tuple[int, int]],
    tensors: Tensors,
) -> list[_BlockPlan]:
    """Return the blocks that do something, without heads where attention does nothing."""
    plans = []
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
    return all(_is_zero(spec.name, tensors) for spec in _leaves(linear))


def _is_zero(name: str, tensors: Tensors) -> bool:
    return not np.asarray(tensors.read(name), np.float32).any()


def _llama_architecture(
    config: Mapping[str, Any], c: decoder.Config, blocks: Sequence[_BlockPlan]
) -> str:
    """Return the architecture of a model that computes what a LLaMA does."""
    if len({(b.heads, b.kv_heads, b.neurons) for b in blocks}) > 1:
        return RAGGED
    own = _own(config)
    # Some families' own has all heads, and the biases of their stock models alone.
    whole = ARCHITECTURES[own].whole_heads and blocks[0].heads * c.head_dim == c.dim
    return own if whole and set(c.biases) == _stock_biases(config) else "llama"


def _stock_biases(config: Mapping[str, Any]) -> set[str]:
    """Return the slots that have a bias in the stock model of the configuration's family."""
    stock = {k: v for k, v in config.items() if k not in ("biases", "widths")}
    return set(hf.family(config).arch(stock | {"model_type": kind_of(config)}).config.biases)


def _plan_tensors(
    arch: Architecture,
    c: decoder.Config,
    non_block: decoder.NonBlockParams,
    blocks: Sequence[_BlockPlan],
    tensors: Tensors,
) -> dict[str, _TensorPlan]:
    """Return what to write under each of llama.cpp's names."""
    plans = {}
    for slot, part in NON_BLOCK.items():
        for spec in _leaves(getattr(non_block, slot)):
            offset = arch.norm_offset if slot == "norm" else 0.0
            source = ((spec.name, spec.shape),)
            plans[f"{part}.{_kind(spec)}"] = _TensorPlan(source, offset=offset)
    for i, block in enumerate(blocks):
        for part, slots in arch.parts().items():
            # Parts of another form of the file: fused where the checkpoint's are apart.
            if len({arch.module(slot) for slot in slots}) > 1:
                continue
            for kind, sources in _sources(c, block, slots).items():
                # Stock forms fill missing biases with zeros, which llama.cpp does without.
                skipped = kind == "bias" and all(_is_zero(n, tensors) for n, _ in sources)
                if skipped or (part.startswith("attn_") and not block.heads):
                    continue
                # llama.cpp rotates neighbouring rows of LLaMA, others' halves as transformers.
                rotates = arch.permuted and slots in (("q",), ("k",))
                offset = arch.norm_offset if slots[0].endswith("norm") else 0.0
                plans[f"blk.{i}.{part}.{kind}"] = _TensorPlan(
                    tuple(sources), c.head_dim if rotates else 0, offset
                )
    return plans


def _sources(
    c: decoder.Config, block: _BlockPlan, slots: Sequence[str]
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Return the tensors of slots with their shapes in the file, by "weight" and "bias"."""
    q, kv, f = block.heads * c.head_dim, block.kv_heads * c.head_dim, block.neurons
    # Rows and columns; what is not named stays as it is.
    rows = {"q": q, "k": kv, "v": kv, "gate": f, "up": f}
    columns = {"o": q, "down": f}
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for slot in slots:
        for spec in _leaves(getattr(block.specs, slot)):
            shape = (rows.get(slot, spec.shape[0]), *spec.shape[1:])
            if len(shape) == 2:
                shape = (shape[0], columns.get(slot, shape[1]))
            found.setdefault(_kind(spec), []).append((spec.name, shape))
    return found


def _kind(spec: hf.Spec) -> str:
    return spec.name.rpartition(".")[2]


def _leaves(tree: Any) -> list[hf.Spec]:
    return jax.tree.leaves(tree, is_leaf=hf.is_spec)


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
    plans: Mapping[str, _TensorPlan],
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
    plans: Mapping[str, _TensorPlan], kinds: Mapping[str, Any], tensors: Tensors
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
            raise _unwritable(f"is not possible: {plan.sources[0][0]} exceeds float16's range")
        yield stored


def _filled(tensors: Tensors, name: str, shape: Sequence[int]) -> np.ndarray:
    """Read a tensor in float32, with zeros after its rows and columns up to a shape."""
    value = np.asarray(tensors.read(name), np.float32)
    return np.pad(value, [(0, n - have) for n, have in zip(shape, value.shape, strict=True)])
