"""Passes over the blocks: each block is visited with the hidden states or statistics that reach it.

`visit_blocks` hands a visitor the hidden states themselves; `calibrate_blocks` hands it statistics
of the block's activations. Both read blocks one at a time, keep a record of each, and go on from
the last finished block of an interrupted run. Under a planning recorder (`models.programs`) the
same passes follow shapes instead of arrays.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from calibration.digests import digest
from calibration.journal import to_serialisable
from calibration.observers import Observer
from calibration.runtime import Runtime
from calibration.states import Offload, States
from models.arch import Arch, Block, Model, Taps, apply_block, embed, experts_of
from models.checkpoint.blocks import prefetch
from models.errors import InputError
from models.experts import Routed, expert_of
from models.programs import program
from models.sharding import STATES, place, placement, split

Watch = tuple[tuple[str, Observer], ...]  # (tap or slot, observer), hashable for jit
Stats = Mapping[str, Any]  # tap or slot -> final state of its observer
Forward = Callable[[Block, jax.Array], tuple[jax.Array, Taps]]  # `Arch.block`
Visit = Callable[[int, Block, Stats], tuple[Block, Any]]


class BlockResult(NamedTuple):
    """Result of visiting a block.

    Attributes:
      block: Block that takes the visited one's place; the same object leaves it as it is.
      record: Value to keep for the block, as `Journal.step` can store it.
      propagated: Whether the visitor has already replaced the block's inputs by its outputs.
    """

    block: Block
    record: Any = None
    propagated: bool = False


@program("statistics begun", static=(0, 1))
def _start(function: Forward, watch: Watch, block: Block, x: jax.Array) -> dict[str, Any]:
    """Return the initial state of every observer, of an expert's tap [e ...]."""
    # Shapes suffice: only the widths of the taps are needed.
    taps = jax.eval_shape(function, block, x)[1]
    states = {}
    for name, observer in watch:
        tap = taps[name]
        if isinstance(tap, Routed):
            of_experts = _of_experts(name, observer).init(tap.x.shape[-1])
            count = tap.tokens.shape[0]
            states[name] = jax.tree.map(
                lambda s, count=count: jnp.broadcast_to(s[None], (count, *s.shape)), of_experts
            )
        else:
            states[name] = observer.init(tap.shape[-1])
    return states


def _of_experts(tap: str, observer: Observer) -> Observer:
    """Return the observer of an expert's tap."""
    if observer.of_experts is None:
        raise InputError(
            f"{tap} holds the tokens of experts, of which this method has no statistics",
            "choose another method or variant for a mixture of experts",
        )
    return observer.of_experts


@program("statistics split by expert")
def _split(states: Any) -> list[Any]:
    """Return the states of each expert from those of all, [e ...]."""
    count = len(jax.tree.leaves(states)[0])
    return [jax.tree.map(lambda s, e=e: s[e], states) for e in range(count)]


# The old states are donated: a Gram matrix of 70B's widths would lie in memory twice.
@program("statistics", static=(0, 1, 2), donated=(5,))
def _observe(
    function: Forward, watch: Watch, onward: bool, block: Block, x: jax.Array, states: Stats
) -> tuple[jax.Array | None, Stats]:
    """Run one micro-batch through one block and update the observers.

    jit removes the taps that nobody watches, and the output unless `onward`.
    """
    y, taps = function(block, x)
    new = {}
    for name, observer in watch:
        tap = taps[name]
        own = _of_experts(name, observer) if isinstance(tap, Routed) else observer
        new[name] = own.update(states[name], tap)
    return y if onward else None, new


@program("statistics checked")
def all_finite(states: Stats) -> jax.Array:
    """Return whether all numbers of the statistics are finite."""
    # One number, so that the host reads back once for a block.
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(states)]))


def micro_batches(tokens: np.ndarray, batch: int, mesh: Mesh | None = None) -> Iterable[jax.Array]:
    """Yield the tokens as micro-batches [b t] on the devices; the last may be smaller.

    Args:
      tokens: Calibration windows, int [samples length].
      batch: Windows in one micro-batch.
      mesh: Windows are split over its `data` axis.
    """
    for start in range(0, len(tokens), batch):
        yield split(tokens[start : start + batch], mesh, "sample")


def _state_shapes(
    model: Model, tokens: np.ndarray, batch: int, mesh: Mesh | None, offload: Offload
) -> list[jax.ShapeDtypeStruct | np.ndarray]:
    """Return the shapes of the hidden states between two blocks, one entry a micro-batch.

    Off the devices they are arrays that take no memory.
    """
    shapes: list[jax.ShapeDtypeStruct | np.ndarray] = []
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        part_shape = jax.ShapeDtypeStruct(part.shape, part.dtype)
        x = jax.eval_shape(model.arch.embed, model.non_block, part_shape)
        if offload == "device":
            sharding = placement(x.shape, mesh, STATES)
            shapes.append(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))
        else:
            shapes.append(np.broadcast_to(np.zeros((), x.dtype), x.shape))
    return shapes


def visit_blocks(
    model: Model,
    tokens: np.ndarray,
    runtime: Runtime,
    visit: Callable[[int, Block, States, bool], BlockResult],
    *,
    name: str,
    durable: bool = True,
    key: Hashable = None,
    records: list[Any] | None = None,
) -> list[Any]:
    """Visit every block with the hidden states that reach it.

    Args:
      model: Read one block at a time.
      tokens: Calibration windows, int [samples length].
      runtime: Micro-batch, devices, memory of the hidden states, progress and journal.
      visit: (index, block, its inputs [b t d] by micro-batch, whether it is the last block) -> what
        replaces it.
      name: What the progress bar says.
      durable: Whether the pass is a step of the journal, so that finished blocks are not visited
        again.
      key: For a pass that changes nothing: everything its records depend on, as `Journal.step` has
        it. Where the journal remembers them from another run, no block is visited.
      records: Empty list that the records go into, for a visitor that needs those of the blocks
        before, also of a run that goes on; None for a new one.

    Returns:
      Record of every block, in order.
    """
    depth, mesh = len(model.blocks), runtime.mesh
    journal = runtime.journal if durable else None
    non_block = place(model.non_block, mesh)
    records = [] if records is None else records
    saved = None
    if journal:
        shapes = _state_shapes(model, tokens, runtime.batch, mesh, runtime.offload)
        finished, saved = journal.begin(shapes, key)
        records += finished
    advance = runtime.progress(name, depth, unit="blocks", tokens=tokens.size, done=len(records))
    xs = States([], runtime.offload, mesh)
    if saved is not None:
        for x in saved:
            xs.append(x)
    elif len(records) < depth:
        for t in micro_batches(tokens, runtime.batch, mesh):
            xs.append(embed(model.arch, non_block, t))
    saved = None  # memory: States has its own
    # The next block is read while the visitor works, so host memory holds three at most: the block,
    # its replacement and the one read ahead.
    blocks = prefetch(model.blocks, range(len(records), depth), mesh)
    for i in range(len(records), depth):
        last = i == depth - 1
        xs.settle()  # so that the device is the visitor's alone
        new, record, propagated = visit(i, next(blocks), xs, last)
        # As a file would give it back, so that a run that goes on sees no other values.
        records.append(to_serialisable(record))
        if not last:
            if not propagated:
                for j, x in enumerate(xs):
                    # In place: one set of hidden states is held during a block, not two.
                    xs[j] = apply_block(model.arch, new, x, name="pruned block")
            if journal:
                journal.reach(i + 1, records, xs.stored())
        advance()
    if journal:
        journal.complete(records, key)
    return records


def overflow(i: int) -> InputError:
    """Return the error for activations of block i that are not finite."""
    return InputError(
        f"the activations of block {i} are not finite",
        "try `dtype`=float32, or download the checkpoint again",
    )


def observe(
    arch: Arch,
    watch: Mapping[str, Observer],
    i: int,
    block: Block,
    xs: States,
    onward: bool = False,
) -> Stats:
    """Return statistics of block i's activations over its inputs.

    Args:
      arch: Architecture of the block.
      watch: Tap or slot -> observer.
      i: Index of the block, for messages.
      block: Parameters.
      xs: Its inputs [b t d] by micro-batch.
      onward: Replace the inputs by the block's outputs.

    Returns:
      Tap or slot -> final state of its observer.

    Raises:
      InputError: The activations overflow; every score made from them would be meaningless.
    """
    own = _taps_of_block(arch, block, watch)
    # Sorted: another order would be another static argument, and compile again.
    # All experts are observed alike, so one tap has them all.
    static = tuple(sorted({expert_of(name)[0]: observer for name, observer in own.items()}.items()))
    if not static and not onward:
        return {}
    # Where the compiler leaves the new states, so that one program serves all micro-batches.
    states: Stats = jax.tree.map(
        lambda s: split(s, xs.mesh, "channel"), _start(arch.block, static, block, xs[0])
    )
    for j, x in enumerate(xs):
        y, states = _observe(arch.block, static, onward, block, x, states)
        if onward:
            xs[j] = y
    # This also waits for the block. Otherwise blocks would gather on a device that is given work
    # faster than it does it.
    if static and not all_finite(states):
        raise overflow(i)
    return _by_name(states, own)


def _taps_of_block(arch: Arch, block: Block, watch: Mapping[str, Observer]) -> dict[str, Observer]:
    """Return the observers without those of parts that the block lacks."""
    everywhere = {name for s in arch.slots for name in (s.reads, s.name)}
    here = {name for s in arch.slots_of(block) for name in (s.reads, s.name, s.part_of)}
    if not experts_of(block):
        watch = {name: o for name, o in watch.items() if not name.startswith("experts.")}
    return {name: o for name, o in watch.items() if name in here or name not in everywhere}


def _by_name(states: Stats, names: Iterable[str]) -> Stats:
    """Return the states by the names that were watched, those of an expert's tap by expert."""
    split: dict[str, list[Any]] = {}
    found = {}
    for name in names:
        tap, expert = expert_of(name)
        if expert is None:
            found[name] = states[tap]
            continue
        if tap not in split:
            split[tap] = _split(states[tap])
        found[name] = split[tap][expert]
    return found


def calibrate_blocks(
    model: Model,
    tokens: np.ndarray,
    runtime: Runtime,
    visit: Visit,
    *,
    watch: Mapping[str, Observer],
    propagate: Literal["pruned", "dense"],
    name: str,
    key: Hashable = None,
) -> list[Any]:
    """Visit every block with statistics of its activations over the calibration tokens.

    Where nothing is watched, blocks are visited without activations.

    Args:
      model: Read one block at a time.
      tokens: Calibration windows, int [samples length].
      runtime: Micro-batch, devices, memory of the hidden states, progress and journal.
      visit: (index, block, statistics) -> (block that takes its place, record to keep).
      watch: Tap or slot -> observer; a tap is a linear's input, a slot's name its output.
      propagate: Outputs that the next block sees: those of the visitor's block ("pruned"), as in
        Wanda and SparseGPT, or of the block as it came ("dense"), which need no second pass.
      name: What the progress bar says.
      key: For a pass that changes nothing: what its records depend on, besides the model and the
        tokens.

    Returns:
      Record of every block, in order.

    Raises:
      InputError: As `observe` does.
    """
    tokens = tokens if watch else tokens[:0]
    dense = propagate == "dense" and bool(watch)

    def visit_with_statistics(i: int, block: Block, xs: States, last: bool) -> BlockResult:
        stats = observe(model.arch, watch, i, block, xs, onward=dense and not last)
        new, record = visit(i, block, stats)
        return BlockResult(new, record, propagated=dense)

    return visit_blocks(
        model,
        tokens,
        runtime,
        visit_with_statistics,
        name=name,
        key=key and (key, digest(tokens)),
    )
