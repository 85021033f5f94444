"""Units of every block, and the parameters that they hold, from shapes alone."""

from collections.abc import Sequence

from models.arch import Model
from pruning.budget import all_experts, all_shapes
from pruning.structured.minitron_core import BlockSize, kept_count
from pruning.structured.unit_scores import EXPERT_MULTIPLE


def block_sizes(model: Model) -> list[BlockSize]:
    """Return the units of every block.

    Args:
      model: Only its shapes are read.
    """
    arch, sizes = model.arch, []
    for shapes in all_shapes(model):
        heads = arch.group("heads")
        parts = [g for g in arch.groups if g.kind == "neurons" and g.reader.name in shapes]
        head = heads.reader.width + sum(w.width for w in heads.writers)
        neuron = sum(1 + len(g.writers) for g in parts)
        kept, neurons = (shapes[g.reader.name][1] // g.reader.width for g in (heads, parts[0]))
        sizes.append(BlockSize(kept, neurons, head, neuron))
    return sizes


def kept_neurons(
    model: Model, blocks: Sequence[BlockSize], share: float, round_to: int
) -> tuple[int, ...]:
    """Return the number of neurons of every block that stays.

    Args:
      model: Says which blocks have experts.
      blocks: Units of each block.
      share: Share of the neurons that stays.
      round_to: Keep a multiple of this many; 0: as many as asked, of experts' neurons a multiple of
        EXPERT_MULTIPLE.
    """
    kept = []
    for b, experts in zip(blocks, all_experts(model), strict=True):
        multiple = round_to or (EXPERT_MULTIPLE if experts else 1)
        kept.append(kept_count(share, b.neurons, multiple))
    return tuple(kept)
