"""Programs of the reconstruction of a block: one step, the held-out error, what is stored.

Hidden states of both models lie in one array [2b t d], as `pruning.structured.depth_streams` has
them: the dense model's are targets, the pruned one's are inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.arch import Arch, Block, Taps
from models.programs import program
from pruning.recovery import blocks_core as core
from pruning.recovery.zeros import keep_zeros, masks_of
from pruning.structured.depth_streams import halves, joined


class Objective(NamedTuple):
    """The output that is compared, and how; a static argument of the programs.

    Attributes:
      function: `Arch.block` of the pruned model.
      loss: Kind of loss.
      attention: Whether the state behind attention is compared, with the dense block's on its own
        inputs; else the block's output, with the dense states that are there.
      branch_scale: Factor of the attention branch before it is added to the stream.
      adds: Whether its output is added as it is. Else the branches' outputs are compared alone.
    """

    function: Callable[[Any, jax.Array], tuple[jax.Array, Taps]]
    loss: core.Loss
    attention: bool = False
    branch_scale: float = 1.0
    adds: bool = True


def attention_fields(arch: Arch) -> tuple[str, ...]:
    """Return the fields of a block that attention's output depends on.

    Args:
      arch: Architecture.
    """
    fields = ("q", "k", "v", "o", "q_norm", "k_norm")
    # In blocks that end in norms, the first norm follows attention.
    return (*fields, "attn_norm") if arch.residual else fields


def leaves_of(block: Block, fields: Sequence[str]) -> tuple[bool, ...]:
    """Return for each leaf of a block in order whether it is of one of some fields.

    Args:
      block: Parameters.
      fields: Names of fields.
    """
    paths, _ = jax.tree.flatten_with_path(block)
    return tuple(str(getattr(path[0], "name", "")) in fields for path, _ in paths)


def _errors(
    objective: Objective, block: Any, dense: Any, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of a block's errors, as `blocks_core.errors` does."""
    of_dense, of_pruned = halves(x)
    y, taps = objective.function(block, of_pruned)
    if not objective.attention:
        return core.errors(objective.loss, y, of_dense)
    y, target = taps["o"], objective.function(dense, of_dense)[1]["o"]
    if objective.adds:
        y, target = (
            state.astype(jnp.float32) + objective.branch_scale * out.astype(jnp.float32)
            for state, out in ((of_pruned, y), (of_dense, target))
        )
    return core.errors(objective.loss, y, target)


@program("recovery begun", static=(0,))
def begin(trained: tuple[bool, ...], block: Block) -> core.Training:
    """Return the state before the first step of the trained leaves."""
    return core.begin(block, trained)


# The old state is donated: it is three times as large as the block in float32.
@program("recovery step", static=(0, 1), donated=(2,))
def step(
    objective: Objective,
    trained: tuple[bool, ...],
    state: core.Training,
    block: Block,
    dense: Block | None,
    x: jax.Array,
    rate: jax.Array,
    decay: jax.Array,
) -> core.Training:
    """Take one step on a micro-batch.

    Args:
      objective: What is compared.
      trained: Whether each leaf of the block is trained, in order.
      state: Masters and moments.
      block: The block before training: its zeros stay, and its other leaves are used as they are.
      dense: The dense block, where attention is compared.
      x: States of both models, [2b t d].
      rate: Learning rate, float32 ().
      decay: Weight decay, float32 ().
    """

    def loss(masters: list[jax.Array]) -> jax.Array:
        error, size = _errors(objective, core.with_masters(block, trained, masters), dense, x)
        return error / size

    masks = core.trained_leaves(masks_of(block), trained)
    return core.update(state, jax.grad(loss)(state.masters), masks, rate, decay)


@program("recovered block rounded", static=(0,))
def stored(trained: tuple[bool, ...], block: Block, masters: list[jax.Array]) -> Block:
    """Return the block with trained leaves, in its types and with its zeros."""
    new: Block = keep_zeros(core.with_masters(block, trained, masters), block)
    return new


@program("held-out error", static=(0,))
def add_held_out(
    objective: Objective, block: Block, dense: Block | None, x: jax.Array, sums: jax.Array
) -> jax.Array:
    """Add the sums of a block's errors on a micro-batch, float32 [2]."""
    return sums + jnp.stack(_errors(objective, block, dense, x))


@program("held-out loss")
def loss_of(sums: jax.Array) -> jax.Array:
    """Return the loss of summed errors, float32 ()."""
    return sums[0] / sums[1]


@program("states embedded")
def with_pruned(x: jax.Array, pruned: jax.Array) -> jax.Array:
    """Return the states of both models [2b t d] with others [b t d] of the pruned one."""
    return joined(halves(x)[0], pruned)
