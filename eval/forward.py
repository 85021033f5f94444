"""Forward passes of many batches through a model whose blocks are read one at a time."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.arch import Model, NonBlockParams, apply_block, embed
from models.checkpoint.blocks import prefetch
from models.progress import Advance, no_advance
from models.sharding import STATES, split

# Bytes of hidden states that pass through the blocks together; more batches read the blocks again.
ACTIVATION_BYTES = 1 << 30


def last_states(
    model: Model,
    non_block: NonBlockParams,
    batches: Sequence[np.ndarray],
    mesh: Mesh | None,
    advance: Advance = no_advance,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield the hidden states after the last block for each batch, in order.

    Args:
      model: Model, whose blocks are read once for every ACTIVATION_BYTES of hidden states, or for
        every batch if one is larger.
      non_block: `model.non_block`, placed on `mesh`.
      batches: Token ids, each int [b t]. They may differ in shape; each shape is compiled once.
      mesh: Mesh, batches are split over its `data` axis; None for one device.
      advance: Called with a batch's number of tokens after each block that it has passed.

    Yields:
      Token ids on the mesh, int [b t], and hidden states after the last block, [b t d].
    """
    state = jax.eval_shape(model.arch.embed, non_block, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    max_tokens = ACTIVATION_BYTES // (state.shape[-1] * state.dtype.itemsize)
    first = 0
    while first < len(batches):
        end, tokens_held = first + 1, batches[first].size
        while end < len(batches) and tokens_held + batches[end].size <= max_tokens:
            tokens_held += batches[end].size
            end += 1
        tokens = [split(batch, mesh, "sample") for batch in batches[first:end]]
        xs = [split(embed(model.arch, non_block, t), mesh, STATES) for t in tokens]
        for block in prefetch(model.blocks, mesh=mesh):
            xs = [split(apply_block(model.arch, block, x), mesh, STATES) for x in xs]
            # Wait: calls that are queued but have not run would keep several blocks in memory. All
            # are queued before the first wait, so that the device is never idle.
            for t, x in zip(tokens, xs, strict=True):
                x.block_until_ready()
                advance(t.size)
        yield from zip(tokens, xs, strict=True)
        first = end
