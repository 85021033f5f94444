"""Programs of distillation: the teacher's targets, one step, the held-out losses, the result.

Letters: b windows, t positions, d hidden size of the student, D of the teacher, k tokens kept of
the teacher's distribution.

Everything that outlasts a step (masters, moments, parameters that are not trained) is fully
sharded. Within a step a block is gathered over `data` where it is used, and again where its
gradient is computed: `jax.checkpoint` keeps the states between blocks alone.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from models.arch import Arch, Block, NonBlockParams, linear_of, with_linears
from models.programs import program
from models.sharding import constrain
from pruning.recovery import distill_core as core
from pruning.recovery.adamw_core import Training, update
from pruning.recovery.adamw_core import begin as first_state
from pruning.recovery.distill_core import Adapter, Likeliest
from pruning.recovery.zeros import keep_zeros, masks_of

Adapters = Mapping[str, Adapter]


class Params(NamedTuple):
    """Parameters of a model, or the part of them that is trained.

    Attributes:
      non_block: Parameters outside the blocks; None where they are not trained.
      blocks: Parameters of each block, or its adapters by slot.
    """

    non_block: Any
    blocks: tuple[Any, ...]


class Setup(NamedTuple):
    """Everything that the programs of a distillation depend on besides arrays.

    Attributes:
      student: Architecture of the pruned model.
      teacher: Architecture of the dense model.
      structure: Structure of the trained `Params`, whose leaves `Training` has.
      dtype: Name of the type to compute in.
      lora: Rank of the adapters; 0 if the parameters themselves are trained.
      temperature: Temperature of both distributions.
      parts: Parts of a batch whose gradients are added up.
      mesh: Mesh; None for one device.
    """

    student: Arch
    teacher: Arch
    structure: Any
    dtype: str
    lora: int
    temperature: float
    parts: int
    mesh: Mesh | None


class Batch(NamedTuple):
    """Windows with the teacher's targets.

    Attributes:
      tokens: Token ids, int32 [b t].
      target: The teacher's last states, [b t D], or its likeliest tokens.
    """

    tokens: jax.Array
    target: jax.Array | Likeliest


@program("parameters sharded", static=(0, 1))
def shard(mesh: Mesh | None, dtype: str, tree: Any) -> Any:
    """Return parameters in a type, fully sharded."""
    # A copy: what is trained is donated, and the tree may belong to someone else.
    return constrain(jax.tree.map(lambda x: jnp.copy(x.astype(dtype)), tree), mesh, "fully_sharded")


@program("adapters begun", static=(0, 1, 2))
def begin_adapters(
    arch: Arch, rank: int, mesh: Mesh | None, block: Block, seed: jax.Array, index: jax.Array
) -> Adapters:
    """Return the adapters of a block's linears, whose changes are zero.

    Args:
      arch: Architecture of the student.
      rank: Rank of the adapters.
      mesh: Mesh; None for one device.
      block: The block.
      seed: Seed of their draw, int32 ().
      index: Index of the block, int32 ().
    """
    slots = [slot.name for slot in arch.slots_of(block)]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index), len(slots))
    adapters = {
        name: core.new_adapter(one, linear_of(block, name).w.shape, rank)
        for name, one in zip(slots, keys, strict=True)
    }
    placed: Adapters = constrain(adapters, mesh, "fully_sharded")
    return placed


@program("teacher", static=(0, 1))
def teacher_states(arch: Arch, mesh: Mesh | None, params: Params, tokens: jax.Array) -> jax.Array:
    """Return the states behind the last block [b t D]; the parameters are fully sharded."""
    non_block = constrain(params.non_block, mesh, "out")
    x = constrain(arch.embed(non_block, tokens), mesh, "sample")
    for block in params.blocks:
        x, _ = arch.block(constrain(block, mesh, "out"), x)
    return x


@program("teacher's likeliest tokens", static=(0, 1, 2, 3))
def likeliest(
    arch: Arch, mesh: Mesh | None, k: int, temperature: float, non_block: Any, x: jax.Array
) -> Likeliest:
    """Return the distribution after states [b t D] by its k likeliest tokens."""
    non_block = constrain(non_block, mesh, "out")

    def piece(x: jax.Array) -> Likeliest:
        return core.likeliest(arch.head(non_block, x) / temperature, k)

    t = x.shape[1]
    pieces = jax.lax.map(piece, core.pieces(x))
    return jax.tree.map(lambda a: core.joined_pieces(a, t), pieces)


def _adapted(arch: Arch, block: Block, adapters: Adapters) -> Block:
    """Return a block with the changes of its adapters."""
    linears = {name: linear_of(block, name) for name in adapters}
    return with_linears(
        block, {n: p.replace(w=core.adapted(p.w, adapters[n])) for n, p in linears.items()}
    )


def _block(setup: Setup, trained: Any, base: Any, x: jax.Array) -> jax.Array:
    """Run a block of the student; `base` is None where the block itself is trained."""
    trained = constrain(trained, setup.mesh, "out")
    if setup.lora:
        block = _adapted(setup.student, constrain(base, setup.mesh, "out"), trained)
    else:
        block = jax.tree.map(lambda w: w.astype(setup.dtype), trained)
    return constrain(setup.student.block(block, x)[0], setup.mesh, "sample")


def _losses(
    setup: Setup, trained: Params, base: Params, teacher: NonBlockParams | None, batch: Batch
) -> jax.Array:
    """Return the sums of a batch's divergence and cross-entropy.

    Args:
      setup: The distillation.
      trained: What is trained.
      base: Parameters that are not trained, with None for those that are.
      teacher: The teacher's parameters outside the blocks; None if its likeliest tokens are kept.
      batch: Windows.

    Returns:
      The divergence times the temperature's square over b t positions, and the cross-entropy over b
      (t - 1), in nats, float32 [2].
    """
    mesh = setup.mesh
    if base.non_block is None:
        non_block = jax.tree.map(lambda w: w.astype(setup.dtype), trained.non_block)
    else:
        non_block = base.non_block
    non_block = constrain(non_block, mesh, "out")
    teacher = constrain(teacher, mesh, "out")
    x = constrain(setup.student.embed(non_block, batch.tokens), mesh, "sample")
    run = jax.checkpoint(functools.partial(_block, setup))
    for block, fixed in zip(trained.blocks, base.blocks, strict=True):
        x = run(block, fixed, x)

    def piece(
        x: jax.Array, target: Any, counts: jax.Array, labels: jax.Array, predicts: jax.Array
    ) -> jax.Array:
        logits = setup.student.head(non_block, x)
        if teacher is None:
            wanted, ids = target.logs, target.ids
        else:
            of_teacher = setup.teacher.head(teacher, target) / setup.temperature
            wanted, ids = core.log_probabilities(of_teacher, None), None
        logs = core.log_probabilities(logits / setup.temperature, ids)
        # Hinton: times the square, so that gradients are as large at every temperature.
        divergence = core.forward_kl(jax.lax.stop_gradient(wanted), logs) * setup.temperature**2
        surprise = _surprise(logits, labels)
        return jnp.stack([jnp.sum(divergence * counts), jnp.sum(surprise * predicts)])

    # Zero where a piece is padded. The last position of a window predicts no token of it, but the
    # teacher has an opinion there as well.
    counts = jnp.ones(batch.tokens.shape, jnp.float32)
    pieces = jax.tree.map(core.pieces, (x, batch.target, counts, *_labels(batch.tokens)))
    return jnp.sum(jax.lax.map(jax.checkpoint(lambda p: piece(*p)), pieces), axis=0)


def _labels(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the token after each position, and 1 where there is one, else 0; both [b t]."""
    return jnp.roll(tokens, -1, axis=1), jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0)


def _surprise(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of each position, float32 [b t]."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _masks(setup: Setup, masters: Params) -> Any:
    """Return which entries of the trained arrays may change."""
    if setup.lora:
        return jax.tree.map(lambda x: jnp.ones(x.shape, bool), masters)
    # The zeros of the masters: a masked entry never leaves zero. Embeddings are no linears.
    return jax.tree.map(
        lambda free, x: free & (x != 0) if x.ndim == 2 else free, masks_of(masters), masters
    )


# The old state is donated: masters and moments are the largest thing in memory.
@program("distillation step", static=(0,), donated=(1,))
def step(
    setup: Setup,
    state: Training,
    base: Params,
    teacher: NonBlockParams | None,
    batch: Batch,
    rate: jax.Array,
    decay: jax.Array,
) -> tuple[Training, jax.Array]:
    """Take one step on a batch.

    Args:
      setup: The distillation.
      state: Masters and moments.
      base: Parameters that are not trained, with None for those that are.
      teacher: As in `_losses`.
      batch: Windows, a multiple of `setup.parts`.
      rate: Learning rate, float32 ().
      decay: Weight decay, float32 ().

    Returns:
      The next state, and the mean divergence of the batch before the step, float32 ().
    """
    masters: Params = jax.tree.unflatten(setup.structure, state.masters)
    size, length = batch.tokens.shape
    positions = size * length

    def divergence(masters: Params, part: Batch) -> jax.Array:
        part = constrain(part, setup.mesh, "sample")
        return _losses(setup, masters, base, teacher, part)[0] / positions

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        new = jax.value_and_grad(divergence)(masters, part)
        new = constrain(new, setup.mesh, "fully_sharded")
        return jax.tree.map(jnp.add, sums, new), None

    # Every part takes some windows of every device, so that none has to move.
    parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, setup.parts, *x.shape[1:]), 0, 1), batch
    )
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, masters))
    (loss, gradient), _ = jax.lax.scan(add, zero, parts)
    masks = jax.tree.leaves(_masks(setup, masters))
    gradients = [
        jnp.where(m, g, 0.0) for g, m in zip(jax.tree.leaves(gradient), masks, strict=True)
    ]
    new = update(state, core.clipped(gradients), masks, rate, decay)
    return constrain(new, setup.mesh, "fully_sharded"), loss


@program("held-out losses", static=(0,))
def held_out(
    setup: Setup,
    masters: list[jax.Array],
    base: Params,
    teacher: NonBlockParams | None,
    batch: Batch,
) -> jax.Array:
    """Return the sums of a batch's divergence and cross-entropy, as `_losses` does."""
    return _losses(setup, jax.tree.unflatten(setup.structure, masters), base, teacher, batch)


@program("teacher's cross-entropy", static=(0, 1))
def cross_entropy(
    arch: Arch, mesh: Mesh | None, non_block: Any, x: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Return the sum of the cross-entropy after states [b t D] over b (t - 1), float32 ()."""
    non_block = constrain(non_block, mesh, "out")

    def piece(x: jax.Array, labels: jax.Array, predicts: jax.Array) -> jax.Array:
        return jnp.sum(_surprise(arch.head(non_block, x), labels) * predicts)

    inputs = (x, *_labels(tokens))
    return jnp.sum(jax.lax.map(lambda p: piece(*p), jax.tree.map(core.pieces, inputs)))


@program("training begun", static=(0,), donated=(1,))
def begin(mesh: Mesh | None, masters: list[jax.Array]) -> Training:
    """Return the state before the first step, fully sharded."""
    state: Training = constrain(first_state(masters, (True,) * len(masters)), mesh, "fully_sharded")
    return state


@program("best state kept", static=(0,))
def copied(dtype: str, masters: list[jax.Array]) -> list[jax.Array]:
    """Return a copy of the masters in a type, which the next step does not take away."""
    return [jnp.copy(x.astype(dtype)) for x in masters]


@program("distilled parameters", static=(0, 1, 2))
def stored(arch: Arch, lora: int, mesh: Mesh | None, trained: Any, old: Any) -> Any:
    """Return what is stored in place of old parameters, in their types and with their zeros.

    Args:
      arch: Architecture of the student.
      lora: Rank of the adapters; 0 without.
      mesh: Mesh; None for one device.
      trained: A block's trained parameters, or its adapters; or those outside the blocks.
      old: The parameters of the pruned model.
    """
    trained = constrain(trained, mesh, "out")
    new = _adapted(arch, old, trained) if lora else trained
    return constrain(keep_zeros(new, old), mesh, "out")
