"""Many batches of tokens through a model whose blocks are read one at a time."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.arch import Model, NonBlockParams, apply_block, embed
from models.checkpoint.reader import prefetch
from models.sharding import split

ACTIVATION_BYTES = (
    1 << 30
)  # hidden states of the batches walked together; more of them walk the blocks again


def last_states(
    model: Model, non_block: NonBlockParams, batches: Sequence[np.ndarray], mesh: Mesh | None
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Each batch's tokens int [b t] where they were put, and what leaves the last block for them [b t d], in the batches' order.

    Args:
      model: its blocks are read once for every ACTIVATION_BYTES of hidden states, or for every batch if one is larger.
      ends: `model.non_block` placed on `mesh`.
      batches: int [b t], of any shapes: each shape is compiled once.
      mesh: batches are split over its `data` axis.
    """
    width = jax.eval_shape(model.arch.embed, non_block, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    room = ACTIVATION_BYTES // (width.shape[-1] * width.dtype.itemsize)  # tokens
    first = 0
    while first < len(batches):
        end, held = first + 1, batches[first].size
        while end < len(batches) and held + batches[end].size <= room:
            held, end = held + batches[end].size, end + 1
        tokens = [split(batch, mesh, "sample") for batch in batches[first:end]]
        xs = [embed(model.arch, non_block, t) for t in tokens]
        for block in prefetch(model.blocks, mesh=mesh):
            xs = jax.block_until_ready(
                [apply_block(model.arch, block, x) for x in xs]
            )  # no blocks gather that wait to be run
        yield from zip(tokens, xs, strict=True)
        first = end
