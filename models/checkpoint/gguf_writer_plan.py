"""Blocks and tensors of a GGUF file: its architecture, its sizes, what lies under each name.

All forms that compute what a LLaMA does are `llama`, and their blocks that differ in width or lost
their attention are `deci`. Qwen2's and Phi-3's own have all heads. Other families have an
architecture whose blocks are alike: narrower blocks are filled with zeros.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from models import decoder, decoder_config
from models.checkpoint.gguf_names import ARCHITECTURES, NON_BLOCK, RAGGED, Architecture
from models.checkpoint.gguf_writer_settings import Sizes, longest_text, unsaid
from models.checkpoint.tensors import Tensors
from models.errors import InputError
from models.families import hf
from models.families.fields import Fields, kind_of
from models.layers import Linear


class BlockPlan(NamedTuple):
    """A block to write.

    Attributes:
      specs: Its specs in the checkpoint.
      heads: Query heads in the file; 0 for no attention.
      kv_heads: Key-value heads.
      neurons: Neurons of the feed-forward part.
    """

    specs: decoder.Block
    heads: int
    kv_heads: int
    neurons: int


class TensorPlan(NamedTuple):
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


def unwritable(reason: str, remedy: str = "leave `output_format` out") -> InputError:
    """Return the error for a model that GGUF cannot hold.

    Args:
      reason: Clause that follows the option.
      remedy: What the user can do about it.
    """
    return InputError(reason, remedy, field="output_format", value="gguf")


def model_settings(config: Mapping[str, Any]) -> decoder_config.Config:
    """Return the settings of a model.

    Args:
      config: Contents of `config.json`.

    Raises:
      InputError: llama.cpp lacks it, whatever its sizes.
    """
    c = hf.family(config).arch(config).config
    if not isinstance(c, decoder_config.Config) or not (_is_llama(c) or _own(config)):
        raise unwritable(f"is not possible: Topiary writes no GGUF of {kind_of(config)}")
    if _is_llama(c) and c.act != "silu":
        raise unwritable(f"is not possible: llama.cpp's LLaMA computes silu, not {c.act}")
    if c.rope.kind == "yarn" and not c.rope.truncate:
        raise unwritable("is not possible: llama.cpp rounds the bounds of yarn's ramp")
    return c


def check_model(config: Mapping[str, Any]) -> None:
    """Check that llama.cpp has the architecture of a model.

    Args:
      config: Contents of `config.json`.

    Raises:
      InputError: It has not.
    """
    c = model_settings(config)
    if not _is_llama(c):
        # Sizes that change in the run are checked again when the file is written.
        sizes = Sizes(len(c.windows), c.query_heads, c.kv_heads, c.ffn_dim)
        _check_said(config, c, _own(config), sizes)


def _is_llama(c: decoder_config.Config) -> bool:
    # LLaMA's own settings leave all switches of the decoder at their defaults.
    return c == decoder_config.as_llama(c) and c.rope.share == 1.0


def _own(config: Mapping[str, Any]) -> str:
    """Return the architecture of a family that is no LLaMA; empty if there is none."""
    kind = kind_of(config)
    # Mistral has none of its own.
    kind = "llama" if kind == "mistral" else kind
    return next((name for name, arch in ARCHITECTURES.items() if arch.model_type == kind), "")


def plan_blocks(
    config: Mapping[str, Any],
    c: decoder_config.Config,
    specs: Sequence[decoder.Block],
    tensors: Tensors,
) -> tuple[list[BlockPlan], str]:
    """Return the blocks to write, and the architecture of the file.

    Args:
      config: Contents of `config.json`.
      c: Its settings.
      specs: Specs of its blocks.
      tensors: The checkpoint's tensors.

    Raises:
      InputError: The architecture cannot hold the blocks.
    """
    counts = c.widths or ((c.kv_heads, c.ffn_dim),) * len(specs)
    if not _is_llama(c):
        architecture = _own(config)
        size = _common_size(c, ARCHITECTURES[architecture], counts)
        plans = [BlockPlan(block, *size) for block in specs]
        _check_said(config, c, architecture, sizes_of(plans))
        return plans, architecture
    plans = _llama_blocks(c, specs, counts, tensors)
    return plans, _llama_architecture(config, c, plans)


def _check_said(
    config: Mapping[str, Any], c: decoder_config.Config, architecture: str, sizes: Sizes
) -> None:
    """Check that the settings of a file of blocks that are alike say all of the model."""
    arch = ARCHITECTURES[architecture]
    if surplus := [slot for slot in c.biases if slot not in arch.biases]:
        raise unwritable(
            f"is not possible: llama.cpp's {architecture} has no biases of {', '.join(surplus)}"
        )
    if arch.tied not in (None, c.tied):
        head = "the embedding alone" if arch.tied else "another matrix than the embedding"
        raise unwritable(f"is not possible: llama.cpp's {architecture} takes {head} as the head")
    positions = Fields(config).count("max_position_embeddings", 2048)
    context = longest_text(c, arch, positions)
    if missing := unsaid(c, architecture, sizes, context):
        raise unwritable(
            f"is not possible: llama.cpp's {architecture} has no setting for this model's "
            f"{', '.join(missing)}"
        )


def sizes_of(blocks: Sequence[BlockPlan]) -> Sizes:
    """Return the sizes of all blocks, as one number where they are alike.

    Args:
      blocks: Blocks to write.
    """
    columns = [list(column) for column in zip(*(b[1:] for b in blocks), strict=True)]
    if all(len(set(column)) == 1 for column in columns):
        return Sizes(len(blocks), *(column[0] for column in columns))
    return Sizes(len(blocks), *columns)


def _common_size(
    c: decoder_config.Config, arch: Architecture, counts: Sequence[tuple[int, int]]
) -> tuple[int, int, int]:
    """Return query heads, key-value heads and neurons that every block fits in."""
    kv_heads, neurons = map(max, zip(*counts, strict=True))
    shared = c.query_heads // c.kv_heads
    if arch.whole_heads:
        kv_heads = max(kv_heads, c.dim // (shared * c.head_dim))
    # Zeros beside the heads would change the mean square that the norm divides by.
    grows = c.qk_norm == "whole" and any(k != kv_heads for k, _ in counts)
    if grows or (arch.whole_heads and kv_heads * shared * c.head_dim != c.dim):
        raise unwritable("is not possible: llama.cpp takes only heads that make up the width")
    return kv_heads * shared, kv_heads, neurons


def _llama_blocks(
    c: decoder_config.Config,
    specs: Sequence[decoder.Block],
    counts: Sequence[tuple[int, int]],
    tensors: Tensors,
) -> list[BlockPlan]:
    """Return the blocks that do something, without heads where attention does nothing."""
    plans = []
    for block, (kv_heads, neurons) in zip(specs, counts, strict=True):
        # Our own form stores a part that lost all units as one unit of zeros.
        own = bool(c.widths)
        empty_attention = own and kv_heads == 1 and _does_nothing(block.o, tensors)
        empty_ffn = own and neurons == 1 and block.down and _does_nothing(block.down, tensors)
        if empty_attention and empty_ffn:
            continue
        kv_heads = 0 if empty_attention else kv_heads
        plans.append(BlockPlan(block, kv_heads * c.query_heads // c.kv_heads, kv_heads, neurons))
    if not plans:
        raise unwritable("is not possible: no block of the model is left")
    if not plans[0].heads:
        # llama.cpp takes the size of heads from the first block only if that has some.
        plans[0] = plans[0]._replace(heads=c.query_heads // c.kv_heads, kv_heads=1)
    return plans


def _does_nothing(linear: Linear, tensors: Tensors) -> bool:
    """Return True if a linear maps everything to zero."""
    return all(_is_zero(spec.name, tensors) for spec in leaves(linear))


def _is_zero(name: str, tensors: Tensors) -> bool:
    return not np.asarray(tensors.read(name), np.float32).any()


def _llama_architecture(
    config: Mapping[str, Any], c: decoder_config.Config, blocks: Sequence[BlockPlan]
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


def plan_tensors(
    arch: Architecture,
    c: decoder_config.Config,
    non_block: decoder.NonBlockParams,
    blocks: Sequence[BlockPlan],
    tensors: Tensors,
) -> dict[str, TensorPlan]:
    """Return what to write under each of llama.cpp's names.

    Args:
      arch: Architecture of the file.
      c: Settings of the model.
      non_block: Specs of the parameters outside the blocks.
      blocks: Blocks to write.
      tensors: The checkpoint's tensors.
    """
    plans = {}
    for slot, part in NON_BLOCK.items():
        for spec in leaves(getattr(non_block, slot)):
            offset = arch.norm_offset if slot == "norm" else 0.0
            source = ((spec.name, spec.shape),)
            plans[f"{part}.{_kind(spec)}"] = TensorPlan(source, offset=offset)
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
                plans[f"blk.{i}.{part}.{kind}"] = TensorPlan(
                    tuple(sources), c.head_dim if rotates else 0, offset
                )
    return plans


def _sources(
    c: decoder_config.Config, block: BlockPlan, slots: Sequence[str]
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Return the tensors of slots with their shapes in the file, by "weight" and "bias"."""
    q, kv, f = block.heads * c.head_dim, block.kv_heads * c.head_dim, block.neurons
    # Rows and columns; what is not named stays as it is.
    rows = {"q": q, "k": kv, "v": kv, "gate": f, "up": f}
    columns = {"o": q, "down": f}
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for slot in slots:
        for spec in leaves(getattr(block.specs, slot)):
            shape = (rows.get(slot, spec.shape[0]), *spec.shape[1:])
            if len(shape) == 2:
                shape = (shape[0], columns.get(slot, shape[1]))
            found.setdefault(_kind(spec), []).append((spec.name, shape))
    return found


def _kind(spec: hf.Spec) -> str:
    return spec.name.rpartition(".")[2]


def leaves(tree: Any) -> list[hf.Spec]:
    """Return the specs of a tree in the order of the parameters.

    Args:
      tree: Specs in place of arrays.
    """
    return jax.tree.leaves(tree, is_leaf=hf.is_spec)
