"""The one walk over a model's blocks, left to right, that every calibrated method is a visitor of.

At any moment the device holds one block, one micro-batch inside it, and the hidden states between two blocks.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from calibration.journal import Journal, ResumePoint, to_serialisable
from calibration.observers import Observer
from calibration.states import Offload, States
from models.arch import Arch, Block, Model, Taps, apply_block, embed
from models.checkpoint.blocks import prefetch
from models.errors import InputError
from models.sharding import place, placement, split

Watch = tuple[tuple[str, Observer], ...]  # what is observed where, as a hashable static argument
Stats = Mapping[str, Any]  # tap or slot -> its observer's final state
Forward = Callable[[Block, jax.Array], tuple[jax.Array, Taps]]  # an architecture's `block`
Visit = Callable[[int, Block, Stats], tuple[Block, Any]]
Rehearse = Callable[
    ..., Any
]  # (what, a function, its arguments as shapes, calls=how often in a run) -> what it gives, as shapes


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(function: Forward, watch: Watch, block: Block, x: jax.Array) -> dict[str, Any]:
    widths = {name: tap.shape[-1] for name, tap in jax.eval_shape(function, block, x)[1].items()}
    return {name: observer.init(widths[name]) for name, observer in watch}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(
    function: Forward, watch: Watch, onward: bool, block: Block, x: jax.Array, states: Stats
) -> tuple[jax.Array | None, Stats]:
    """One micro-batch through one block. Taps nobody watches, and the output unless `onward`, are not computed."""
    y, taps = function(block, x)
    return y if onward else None, {
        name: observer.update(states[name], taps[name]) for name, observer in watch
    }


@jax.jit
def _finite(states: Stats) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(states)]))


def batches(tokens: np.ndarray, batch: int, mesh: Mesh | None = None) -> Iterable[jax.Array]:
    """Tokens [samples length] as micro-batches [b length], windows split over the mesh's `data` axis; the last may be smaller."""
    for start in range(0, len(tokens), batch):
        yield split(tokens[start : start + batch], mesh, "sample")


def _shapes(
    model: Model, tokens: np.ndarray, batch: int, mesh: Mesh | None, offload: Offload
) -> list[jax.ShapeDtypeStruct | np.ndarray]:
    """What the hidden states between two blocks are like, a micro-batch each: where they are not on the devices, arrays without memory."""
    found: list[jax.ShapeDtypeStruct | np.ndarray] = []
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        x = jax.eval_shape(
            model.arch.embed, model.non_block, jax.ShapeDtypeStruct(part.shape, part.dtype)
        )
        if offload == "device":
            found.append(
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement(x.shape, mesh, "sample"))
            )
        else:
            found.append(np.broadcast_to(np.zeros((), x.dtype), x.shape))
    return found


class BlockResult(NamedTuple):
    """What became of a block: the one that takes its place, what is to be remembered of it (`journal.plain`), and whether the visitor
    has made its inputs what the next block sees; else the new block is run over them."""

    block: Block
    record: Any = None
    propagated: bool = False


def walk_blocks(
    model: Model,
    tokens: np.ndarray,
    visit: Callable[[int, Block, States, bool], BlockResult],
    *,
    batch: int = 8,
    mesh: Mesh | None = None,
    offload: Offload = "device",
    advance: Callable[[], None] = lambda: None,
    journal: Journal | None = None,
    key: Hashable = None,
) -> list[Any]:
    """Visit every block with the hidden states that reach it: what `fold_blocks` is made of, for methods that need more than statistics.

    Args:
      visit: (i, block, its inputs [b t d] a micro-batch, whether it is the last) -> what became of it.
      journal: makes the walk one of its steps; blocks that were finished before are not visited.
      key: of a walk that only looks: what its records depend on, as `Journal.step` has it. Where the journal remembers them of another
        run no block is visited.
    The others are `fold_blocks`'. Returns every block's record, in order.
    """
    depth, non_block = len(model.blocks), place(model.non_block, mesh)
    records, saved = (
        journal.begin(_shapes(model, tokens, batch, mesh, offload), key)
        if journal
        else ResumePoint([], None)
    )
    for _ in records:
        advance()
    fresh = (
        (embed(model.arch, non_block, t) for t in batches(tokens, batch, mesh))
        if len(records) < depth
        else []
    )
    xs = States(fresh if saved is None else saved, offload, mesh)
    del saved
    blocks = prefetch(model.blocks, range(len(records), depth), mesh)
    for i in range(len(records), depth):
        last = i == depth - 1
        new, record, propagated = visit(i, next(blocks), xs, last)
        records.append(to_serialisable(record))
        if not last:
            if not propagated:
                for j, x in enumerate(xs):
                    xs[j] = apply_block(model.arch, new, x)
            if journal:
                journal.reach(i + 1, records, xs.stored())
        advance()
    if journal:
        journal.complete(records, key)
    return records


def overflow(i: int) -> InputError:
    """What to raise when numbers made from block i's activations are not finite."""
    return InputError(
        f"the activations of block {i} are not finite: try --dtype=float32, or fetch the checkpoint again"
    )


def observe(
    arch: Arch,
    watch: Mapping[str, Observer],
    i: int,
    block: Block,
    xs: States,
    onward: bool = False,
) -> Stats:
    """Statistics of block i over its inputs, which become its outputs in place if `onward`.

    Raises InputError when the block's activations overflow: every score made from them would be meaningless.
    """
    static = tuple(sorted(watch.items()))
    if not static and not onward:
        return {}
    states: Stats = _start(arch.block, static, block, xs[0])
    for j, x in enumerate(xs):
        y, states = _observe(arch.block, static, onward, block, x, states)
        if onward:
            xs[j] = y
    if static and not _finite(states):
        raise overflow(i)
    return states


def rehearse_fold(
    model: Model,
    tokens: jax.ShapeDtypeStruct,
    run: Rehearse,
    *,
    watch: Mapping[str, Observer],
    propagate: Literal["pruned", "dense"],
    batch: int = 8,
) -> tuple[jax.ShapeDtypeStruct, Stats]:
    """What `fold_blocks` compiles, told to `run`: (the states of a micro-batch, the statistics of a block), as shapes.

    Args:
      model: of shapes.
      tokens: of shapes.
    """
    arch, static, blocks = model.arch, tuple(sorted(watch.items())), len(model.blocks)
    steps = -(-tokens.shape[0] // batch)
    part = jax.ShapeDtypeStruct((batch, *tokens.shape[1:]), tokens.dtype, sharding=tokens.sharding)
    x = run("embedding", functools.partial(embed, arch), model.non_block, part, calls=steps)
    if not static:
        return x, {}
    onward = propagate == "dense"
    block = model.blocks[0]
    states = jax.eval_shape(functools.partial(_start, arch.block, static), block, x)
    update = functools.partial(_observe, arch.block, static, onward)
    _, states = run("statistics", update, block, x, states, calls=steps * blocks)
    if not onward:
        run(
            "pruned block",
            functools.partial(apply_block, arch),
            block,
            x,
            calls=steps * (blocks - 1),
        )
    return x, states


def fold_blocks(
    model: Model,
    tokens: np.ndarray,
    visit: Visit,
    *,
    watch: Mapping[str, Observer],
    propagate: Literal["pruned", "dense"],
    batch: int = 8,
    mesh: Mesh | None = None,
    offload: Offload = "device",
    advance: Callable[[], None] = lambda: None,
    journal: Journal | None = None,
    key: Hashable = None,
) -> list[Any]:
    """Visit every block with the statistics of its activations over the calibration tokens.

    Args:
      model: read one block at a time.
      tokens: int [samples length].
      visit: (i, block, statistics) -> (the block that takes its place, the same one to leave it; a record of it, as `BlockResult` has it).
      watch: tap or slot name -> observer; a tap is a linear's input, a slot's name its output.
      propagate: what the next block sees: outputs of the visited ("pruned") block, as Wanda and SparseGPT do, or of the dense one,
        which then cost no second pass.
      batch: windows in one micro-batch.
      mesh: windows are split over its `data` axis, matrices over `model`.
      tier: where the hidden states between two blocks are kept; no result depends on it.
      advance: called after every block, for a progress bar.
      journal: as `walk_blocks` has it.
      key: as `walk_blocks` has it.
    Returns every block's record. Raises InputError as `observe` does.
    """
    dense = propagate == "dense"

    def each(i: int, block: Block, xs: States, last: bool) -> BlockResult:
        new, record = visit(i, block, observe(model.arch, watch, i, block, xs, dense and not last))
        return BlockResult(new, record, propagated=dense)

    return walk_blocks(
        model,
        tokens,
        each,
        batch=batch,
        mesh=mesh,
        offload=offload,
        advance=advance,
        journal=journal,
        key=key,
    )
