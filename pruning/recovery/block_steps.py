"""Programs of the reconstruction of a block: one step, the held-out error, what is stored.

Hidden states of both models lie in one array [2b t d], as `pruning.structured.depth_streams` has
them: the dense model's are targets, the pruned one's are inputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from models.arch import Block, Taps
from models.programs import program
from pruning.recovery import adamw_core, distill_core
from pruning.recovery import blocks_core as core
from pruning.recovery.zeros import keep_zeros, masks_of
from pruning.structured.depth_streams import halves, joined

Forward = Callable[[Any, jax.Array], tuple[jax.Array, Taps]]  # `Arch.block`
Head = Callable[[Any, jax.Array], jax.Array]  # `Arch.head`


class Objective(NamedTuple):
    """The output that is compared, and how; a static argument of the programs.

    Attributes:
      function: `Arch.block` of the pruned model.
      loss: Kind of loss.
      attention: Linear that attention ends in, to compare the state behind it with the dense
        block's on its own inputs; empty to compare the block's output.
      branch_scale: Factor of the attention branch before it is added to the stream.
      adds: Whether its output is added as it is. Else the branches' outputs are compared alone.
      heads: `Arch.head` of the dense and of the pruned model, to compare the logits behind the last
        block; None to compare the block's output with the dense states.
    """

    function: Forward
    loss: core.Loss
    attention: str = ""
    branch_scale: float = 1.0
    adds: bool = True
    heads: tuple[Head, Head] | None = None


def leaves_behind(function: Forward, tap: str, block: Block, x: Any) -> tuple[bool, ...]:
    """Return for each leaf of a block in order whether a tap depends on it.

    Args:
      function: `Arch.block`.
      tap: Name of the tap, or of the linear that gives it.
      block: Parameters.
      x: Hidden states [b t d], or their shape.
    """
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(block)]
    structure = jax.tree.structure(block)

    def output(leaves: list[Any], x: jax.Array) -> Any:
        return function(jax.tree.unflatten(structure, leaves), x)[1][tap]

    traced = jax.make_jaxpr(output)(shapes, jax.ShapeDtypeStruct(x.shape, x.dtype)).jaxpr
    # Backwards from the tap, since what is behind it is in the trace as well.
    needed = {v for v in traced.outvars if isinstance(v, Var)}
    for equation in reversed(traced.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed |= {v for v in equation.invars if isinstance(v, Var)}
    return tuple(v in needed for v in traced.invars[: len(shapes)])


def _errors(
    objective: Objective, block: Any, reference: Any, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of a block's errors, as `blocks_core.errors` does."""
    of_dense, of_pruned = halves(x)
    y, taps = objective.function(block, of_pruned)
    if objective.heads:
        sums = divergence(objective.heads, reference, of_dense, y)
        return sums, jnp.float32(y.shape[0] * y.shape[1])
    if not objective.attention:
        return core.errors(objective.loss, y, of_dense)
    branch = objective.attention
    y, target = taps[branch], objective.function(reference, of_dense)[1][branch]
    if objective.adds:
        y, target = (
            state.astype(jnp.float32) + objective.branch_scale * out.astype(jnp.float32)
            for state, out in ((of_pruned, y), (of_dense, target))
        )
    return core.errors(objective.loss, y, target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def divergence(
    heads: tuple[Head, Head], non_block: tuple[Any, Any], dense: jax.Array, pruned: jax.Array
) -> jax.Array:
    """Return the divergence of the logits behind states from the dense ones.

    Its gradient is that of the pruned model's states alone. It is made together with the value,
    since logits are too large to keep, and half of the work if they are made again.

    Args:
      heads: `Arch.head` of the dense and of the pruned model.
      non_block: Their parameters outside the blocks.
      dense: States behind the last block, [b t d].
      pruned: Those of the pruned model, [b t d].

    Returns:
      The sum over tokens in nats, float32 ().
    """
    cut = _pieces(dense, pruned)
    return jnp.sum(jax.lax.map(lambda piece: _divergence_of(heads, non_block, *piece), cut))


def _pieces(dense: jax.Array, pruned: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return states in pieces of positions, and for each position 1, or 0 if it is padding."""
    counts = jnp.ones(dense.shape[:2], jnp.float32)
    return distill_core.pieces(dense), distill_core.pieces(pruned), distill_core.pieces(counts)


def _divergence_of(
    heads: tuple[Head, Head],
    non_block: tuple[Any, Any],
    dense: jax.Array,
    pruned: jax.Array,
    counts: jax.Array,
) -> jax.Array:
    """Return the sum of the divergence over the counted positions of a piece."""
    of_dense, of_pruned = (
        head(parameters, x)
        for head, parameters, x in zip(heads, non_block, (dense, pruned), strict=True)
    )
    return jnp.sum(distill_core.forward_kl_of_logits(of_dense, of_pruned) * counts)


def _divergence_forward(
    heads: tuple[Head, Head], non_block: tuple[Any, Any], dense: jax.Array, pruned: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the divergence and its gradient [b t d]."""
    of_piece = jax.value_and_grad(functools.partial(_divergence_of, heads, non_block), argnums=1)
    sums, gradients = jax.lax.map(lambda piece: of_piece(*piece), _pieces(dense, pruned))
    return jnp.sum(sums), distill_core.joined_pieces(gradients, pruned.shape[1])


def _divergence_backward(
    heads: tuple[Head, Head], gradient: jax.Array, factor: jax.Array
) -> tuple[None, None, jax.Array]:
    """Return the gradient with respect to the pruned model's states alone."""
    return None, None, factor.astype(gradient.dtype) * gradient


divergence.defvjp(_divergence_forward, _divergence_backward)


@program("recovery begun", static=(0,))
def begin(trained: tuple[bool, ...], block: Block) -> adamw_core.Training:
    """Return the state before the first step of the trained leaves."""
    return adamw_core.begin(block, trained)


# The old state is donated: it is three times as large as the block in float32.
@program("recovery step", static=(0, 1), donated=(2,))
def step(
    objective: Objective,
    trained: tuple[bool, ...],
    state: adamw_core.Training,
    block: Block,
    reference: Any,
    x: jax.Array,
    rate: jax.Array,
    decay: jax.Array,
) -> adamw_core.Training:
    """Take one step on a micro-batch.

    Args:
      objective: What is compared.
      trained: Whether each leaf of the block is trained, in order.
      state: Masters and moments.
      block: The block before training: its zeros stay, and its other leaves are used as they are.
      reference: The dense block where attention is compared; the parameters outside the blocks of
        the dense and of the pruned model where logits are; else None.
      x: States of both models, [2b t d].
      rate: Learning rate, float32 ().
      decay: Weight decay, float32 ().
    """

    def loss(masters: list[jax.Array]) -> jax.Array:
        error, size = _errors(objective, core.with_masters(block, trained, masters), reference, x)
        return error / size

    masks = adamw_core.trained_leaves(masks_of(block), trained)
    return adamw_core.update(state, jax.grad(loss)(state.masters), masks, rate, decay)


@program("recovered block rounded", static=(0,))
def stored(trained: tuple[bool, ...], block: Block, masters: list[jax.Array]) -> Block:
    """Return the block with trained leaves, in its types and with its zeros."""
    new: Block = keep_zeros(core.with_masters(block, trained, masters), block)
    return new


@program("held-out error", static=(0,))
def add_held_out(
    objective: Objective, block: Block, reference: Any, x: jax.Array, sums: jax.Array
) -> jax.Array:
    """Add the sums of a block's errors on a micro-batch, float32 [2]."""
    return sums + jnp.stack(_errors(objective, block, reference, x))


@program("held-out loss")
def loss_of(sums: jax.Array) -> jax.Array:
    """Return the loss of summed errors, float32 ()."""
    return sums[0] / sums[1]


@program("states embedded")
def with_pruned(x: jax.Array, pruned: jax.Array) -> jax.Array:
    """Return the states of both models [2b t d] with others [b t d] of the pruned one."""
    return joined(halves(x)[0], pruned)
