"""SparseLLM on one block: the solver alone for attention, then the joint solution of the rest."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from calibration.observers import gram
from calibration.passes import observe, overflow
from calibration.states import States
from models.arch import Arch, Block, experts_of
from models.errors import InputError
from models.programs import Program, program
from models.sharding import spread_tokens, to_host
from pruning.types import Pruner
from pruning.weights import sparsegpt_core
from pruning.weights.per_linear import every_tap, figures, solve_block, watched
from pruning.weights.sparsellm_core import Counts, Ffn, Settings, Solution
from pruning.weights.sparsellm_corrected_core import solve_corrected
from pruning.weights.sparsellm_official_core import Aux, solve_official

# Blocks that the authors' code for gated models iterates once, whatever the model's depth.
ITERATED_ONCE = (1, 30, 31)
FFN_FIGURES = "feed-forward"  # what the report calls the figures of the joint solution


class FfnNames(NamedTuple):
    """Slots and taps of the feed-forward part.

    Attributes:
      w1: Linear path into the neurons.
      gate: Linear that gates them; None without one.
      w2: Reader of the neurons.
      input_tap: Tap that enters the part.
      hidden_tap: Tap that enters W2.
    """

    w1: str
    gate: str | None
    w2: str
    input_tap: str
    hidden_tap: str

    @property
    def writers(self) -> tuple[str, ...]:
        """Return the slots that write the neurons: W1 and its gate."""
        return (self.w1, self.gate) if self.gate else (self.w1,)

    @property
    def slots(self) -> tuple[str, ...]:
        """Return all slots of the part."""
        return (*self.writers, self.w2)


@functools.cache
def ffn_names(arch: Arch) -> FfnNames:
    """Return the names of an architecture's feed-forward part."""
    group = arch.group("neurons")
    *gates, w1 = (writer.name for writer in group.writers)
    w2 = group.reader.name
    return FfnNames(w1, gates[0] if gates else None, w2, arch.tap(w1), arch.tap(w2))


def ffn_of(arch: Arch, block: Block) -> Ffn:
    """Return the block's feed-forward part in float32."""
    names = ffn_names(arch)
    gate = getattr(block, names.gate) if names.gate else None
    part = Ffn(getattr(block, names.w1), gate, getattr(block, names.w2))
    # float32 throughout. The official code rounds its fits to float16, where OPT's gradient steps
    # on W2 are too small to survive.
    return jax.tree.map(lambda w: w.astype(jnp.float32), part)


@program("solution stored", static=(0,))
def _with_ffn(arch: Arch, block: Block, ffn: Ffn) -> Block:
    """Return the block with the part's matrices, in the block's types."""
    names = ffn_names(arch)
    solved = {names.w1: ffn.w1, names.w2: ffn.w2}
    if names.gate and ffn.gate is not None:
        solved[names.gate] = ffn.gate
    stored = {}
    for name, linear in solved.items():
        dense = getattr(block, name)
        # Biases never change, as in the official code.
        stored[name] = dense.replace(w=linear.w.astype(dense.w.dtype))
    return block.replace(**stored)


@program("activations", static=(0,))
def _activations(arch: Arch, block: Block, x: jax.Array) -> dict[str, jax.Array]:
    """Return the activations of the feed-forward part in float32, [b t ...] by slot or tap."""
    taps, names = arch.block(block, x)[1], ffn_names(arch)
    wanted = (*names.slots, names.input_tap, names.hidden_tap)
    return {name: taps[name].astype(jnp.float32) for name in wanted}


@program("activations joined")
def _join(parts: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Return the micro-batches' activations as one, [samples t ...]."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


_hessian = Program(sparsegpt_core.hessian, "Hessian scaled")


@program("alternation", static=(0, 6))
def _solve_official(
    arch: Arch,
    block: Block,
    taps: Mapping[str, jax.Array],
    h1: jax.Array,
    h2: jax.Array,
    counts: Counts,
    settings: Settings,
) -> Solution:
    """Solve the feed-forward part as the authors' code does."""
    names = ffn_names(arch)
    gate = taps[names.gate] if names.gate else None
    aux = Aux(taps[names.w1], gate, taps[names.hidden_tap])
    part = ffn_of(arch, block)
    return solve_official(
        part, taps[names.input_tap], taps[names.w2], aux, h1, h2, counts, settings
    )


@program("targets", static=(0, 1))
def ffn_inputs_and_targets(
    arch: Arch, mesh: Mesh | None, dense: Block, pruned: Block, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the feed-forward input after pruned attention, and its target.

    The target is the dense output, plus the error of pruned attention where the part is added to
    the residual stream without a norm after it. Both come from the outputs of linears: the stream
    itself, whose largest channels are thousands, would leave few digits of a bfloat16 difference.

    Args:
      arch: Architecture.
      mesh: Devices that the result is spread over; None for one.
      dense: The dense block.
      pruned: The block with pruned attention.
      x: Inputs of the block [b t d].

    Returns:
      Input and target of the part, both [b t d] in x's type.
    """
    source, target = _input_and_target(arch, dense, pruned, x)
    return spread_tokens(source, mesh), spread_tokens(target, mesh)


def _input_and_target(
    arch: Arch, dense: Block, pruned: Block, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the input and the target of `ffn_inputs_and_targets`."""
    names, attention = ffn_names(arch), arch.group("heads").reader.name
    taps = arch.block(pruned, x)[1]
    # A norm follows the sum there: the errors of the two parts no longer add up.
    if not arch.outputs_add:
        return taps[names.input_tap], taps[names.w2]
    dense_taps = arch.block(dense, x)[1]
    # In float32, so that the target is rounded once, by the cast at the end.
    dense_output, pruned_output = dense_taps[attention], taps[attention]
    attention_error = dense_output.astype(jnp.float32) - pruned_output.astype(jnp.float32)
    target = dense_taps[names.w2].astype(jnp.float32) + attention_error
    return taps[names.input_tap], target.astype(x.dtype)


@program("alternation", static=(0, 5))
def _solve_corrected(
    arch: Arch,
    block: Block,
    x: tuple[jax.Array, ...],
    y: tuple[jax.Array, ...],
    counts: Counts,
    settings: Settings,
) -> Solution:
    """Solve the feed-forward part toward its targets."""
    return solve_corrected(ffn_of(arch, block), x, y, counts, settings)


@program("targets stacked", static=(0,))
def _stack(mesh: Mesh | None, parts: Sequence[jax.Array]) -> jax.Array:
    """Return micro-batches of one size as [micro-batches b t d]."""
    return spread_tokens(jnp.stack(parts), mesh)


def _stack_by_size(mesh: Mesh | None, parts: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Return micro-batches as stacks [micro-batches b t d], the last alone if it is smaller.

    Empties the list, so that the parts do not lie in memory twice.
    """
    # A scan needs one shape. Padding a smaller last micro-batch would add to the sums.
    sizes = dict.fromkeys(len(part) for part in parts)
    stacks = tuple(_stack(mesh, [p for p in parts if len(p) == size]) for size in sizes)
    parts.clear()
    return stacks


class PrunedBlock(NamedTuple):
    """A pruned block.

    Attributes:
      block: The block.
      figures: Figures of the solvers: tap -> name -> value.
      losses: Mean squared error of the feed-forward part after each iteration.
    """

    block: Block
    figures: dict[str, dict[str, float]]
    losses: list[float]


class BlockSolver(NamedTuple):
    """Solver of blocks, with what all blocks share.

    Attributes:
      arch: Architecture.
      settings: Settings of the alternation.
      pruner: Layer-wise rule for attention and for experts.
      official: Whether the alternation is the authors' own.
      mesh: Devices that tokens are spread over; None for one.
    """

    arch: Arch
    settings: Settings
    pruner: Pruner
    official: bool
    mesh: Mesh | None

    def _official(
        self, i: int, dense: Block, xs: States, stats: Mapping[str, Any], counts: Counts
    ) -> Solution:
        names = ffn_names(self.arch)
        # Both from the dense block, as X and Y: the official code takes none of them again after it
        # has pruned attention.
        h1, h2 = _hessian(stats[names.input_tap]), _hessian(stats[names.hidden_tap])
        # All tokens at once, because the official pseudo-inverses are of the whole X and p.
        taps = _join([_activations(self.arch, dense, x) for x in xs])
        settings = self.settings
        # The official loop for OPT has no such list.
        if i in ITERATED_ONCE and names.gate is not None:
            settings = settings._replace(iterations=1)
        return _solve_official(self.arch, dense, taps, h1, h2, counts, settings)

    def _corrected(self, dense: Block, pruned: Block, xs: States, counts: Counts) -> Solution:
        inputs: list[jax.Array] = []
        targets: list[jax.Array] = []
        for x in xs:
            ffn_input, target = ffn_inputs_and_targets(self.arch, self.mesh, dense, pruned, x)
            inputs.append(ffn_input)
            targets.append(target)
        stacks = _stack_by_size(self.mesh, inputs), _stack_by_size(self.mesh, targets)
        return _solve_corrected(self.arch, dense, *stacks, counts, self.settings)

    def _solve_experts(
        self, i: int, block: Block, xs: States, counts: Mapping[str, Any]
    ) -> PrunedBlock:
        """Prune a block with experts by the rule, each expert by its own tokens."""
        # The joint solution changes what enters an expert's last linear, not which tokens do: it
        # would need every expert's tokens apart.
        pruners = every_tap(self.arch, self.pruner)
        stats = observe(self.arch, watched(pruners), i, block, xs)
        pruned, notes = solve_block(self.arch, pruners, self.settings.pattern, block, stats, counts)
        return PrunedBlock(pruned, figures(i, notes), [])

    def solve(self, i: int, block: Block, xs: States, counts: Mapping[str, Any]) -> PrunedBlock:
        """Prune block i.

        Args:
          i: Index of the block.
          block: The dense block.
          xs: Its inputs [b t d] by micro-batch.
          counts: Slot -> entries to remove.

        Raises:
          InputError: The official alternation diverged, or the activations overflow.
        """
        arch, pattern = self.arch, self.settings.pattern
        if experts_of(block):
            return self._solve_experts(i, block, xs, counts)
        names = ffn_names(arch)
        attention = {name: count for name, count in counts.items() if name not in names.slots}
        # The corrected part sums up its own statistics as it goes, so only attention's are needed
        # here. The largest Gram matrix of a block, f x f of the hidden activations, is left out.
        taps = [s.reads for s in arch.slots if self.official or s.name in attention]
        stats = observe(arch, dict.fromkeys(taps, gram), i, block, xs)
        pruners = every_tap(arch, self.pruner)
        pruned, notes = solve_block(arch, pruners, pattern, block, stats, attention)
        of_part = Counts(tuple(counts[name] for name in names.writers), counts[names.w2])
        if self.official:
            solution = self._official(i, block, xs, stats, of_part)
        else:
            del stats  # memory: the alternation reads its own sums
            solution = self._corrected(block, pruned, xs, of_part)
        block_figures = figures(i, {**notes, FFN_FIGURES: {"damping": solution.damping}})
        losses = [float(x) for x in to_host(solution.losses)]
        # The last iteration is the one that stays, whatever came before.
        if self.official and not np.isfinite(losses[-1]):
            raise InputError(
                f"block {i}: the official alternation diverged, as it does on this model",
                'use variant="corrected"',
            )
        # Iteration 0 is the solver alone: if even its loss is not finite, the activations are not.
        if not np.any(np.isfinite(losses)):
            raise overflow(i)
        return PrunedBlock(_with_ffn(arch, pruned, solution.ffn), block_figures, losses)
