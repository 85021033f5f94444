"""Units of every block, and the parameters that they hold, from shapes alone."""

from models.arch import Model
from pruning.budget import all_shapes
from pruning.structured.minitron_core import BlockSize


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
