"""Follow a method on shapes alone: what it would write at a sparsity, before any forward."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.runtime import Runtime
from models.arch import Model, linear_of, with_linears
from models.checkpoint.blocks import ShapeBlocks
from models.checkpoint.output_format import Layout, choose_form, shape_of
from models.checkpoint.reader import abstract
from models.errors import InputError
from models.experts import expert_of
from models.families import hf
from models.programs import ShapeRecorder, record_programs
from models.sharding import make_mesh
from models.stream import width_of
from pruning.structured.remove import remove_units
from pruning.types import Method, Outcome, Request

# One short window: no shape of a result depends on the number or the length of the windows.
WINDOW = (1, 8)


class Written(NamedTuple):
    """A checkpoint on shapes.

    Attributes:
      config: Contents of `config.json`.
      non_block: Specs of the parameters outside the blocks.
      blocks: Specs of each block.
      entries: By name: entries that are neither padding nor zero, of tensors that have others.
    """

    config: dict[str, Any]
    non_block: Any
    blocks: tuple[Any, ...]
    entries: Mapping[str, int]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by name."""
        leaves = jax.tree.leaves((self.non_block, self.blocks), is_leaf=hf.is_spec)
        return {spec.name: spec.shape for spec in leaves}

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the matrix of each of the blocks' linears by name."""
        arch = hf.specs(self.config)[0]
        specs = [linear_of(b, s.name).w for b in self.blocks for s in arch.slots_of(b)]
        return {spec.name: spec.shape for spec in specs}

    @property
    def parameters(self) -> int:
        """Return the number of parameters, padding included."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def written_as(
    config: Mapping[str, Any],
    blocks: Sequence[Any],
    kept: Sequence[int] | None,
    layout: Layout,
    zeros: Mapping[tuple[int, str], int],
    hidden: int | None = None,
) -> Written:
    """Return the checkpoint that the writer makes of pruned blocks.

    Args:
      config: Contents of the dense model's `config.json`.
      blocks: Shapes of the blocks that stay.
      kept: Original index of each; None for all blocks.
      layout: How blocks of different widths are written.
      zeros: Zeros in a linear, by the block's place in `blocks` and slot.
      hidden: Channels of the residual stream that stay; None for all.
    """
    arch = hf.specs(config)[0]
    slots = [(b, s.name) for b in blocks for s in arch.slots_of(b)]
    biases = {name for block, name in slots if linear_of(block, name).b is not None}
    config = config if kept is None else hf.shallower(config, kept)
    config = config if hidden is None else hf.narrower(config, hidden)
    shapes = [shape_of(arch, b) for b in blocks]
    form = choose_form(config, shapes, sorted({*arch.config.biases, *biases}), layout)
    written_arch, non_block, specs = hf.specs(form.config)
    entries = {}
    for i, (block, spec) in enumerate(zip(blocks, specs, strict=True)):
        for slot in written_arch.slots_of(spec):
            own, stored = linear_of(block, slot.name).w, linear_of(spec, slot.name).w
            left = math.prod(own.shape) - zeros.get((i, slot.name), 0)
            if left < math.prod(stored.shape):
                entries[stored.name] = left
    return Written(form.config, non_block, specs, entries)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model on shapes with the method that prunes it.

    Attributes:
      config: Contents of the dense model's `config.json`.
      method: The method.
      request: The request, whose sparsity is to be found.
      layout: How blocks of different widths are written.
    """

    config: Mapping[str, Any]
    method: Method
    request: Request
    layout: Layout

    @functools.cached_property
    def model(self) -> Model:
        """Return the model of shapes."""
        arch, non_block, blocks = hf.specs(self.config)
        shapes = abstract(arch, non_block, blocks, jnp.float32)
        return Model(arch, shapes.non_block, ShapeBlocks(blocks, jnp.float32))

    @functools.cached_property
    def dense(self) -> Written:
        """Return the dense checkpoint."""
        _, non_block, blocks = hf.specs(self.config)
        return Written(dict(self.config), non_block, blocks, {})

    @functools.cached_property
    def _recorder(self) -> ShapeRecorder:
        # One recorder for all trials: each program is traced once for each set of shapes.
        return ShapeRecorder(make_mesh("", 1, jax.local_devices()[:1]))

    def accepts(self, sparsity: float) -> bool:
        """Return whether the method takes a sparsity on this model.

        Args:
          sparsity: Fraction to remove.
        """
        try:
            self.method.check(self.model, dataclasses.replace(self.request, sparsity=sparsity))
        except InputError:
            return False
        return True

    def at(self, sparsity: float) -> Written:
        """Return what the method writes at a sparsity, as far as shapes tell.

        Args:
          sparsity: Fraction to remove.
        """
        # An allocation moves zeros between linears and leaves their number.
        request = dataclasses.replace(self.request, sparsity=sparsity, allocation=None)
        chosen = getattr(self.method, "without_search", None)
        method = chosen(self.model, request) if chosen else self.method
        made: dict[int, Any] = {}
        with record_programs(self._recorder):
            runtime = Runtime(batch=WINDOW[0], offload="device")
            outcome = method.run(
                self.model, np.zeros(WINDOW, np.int32), request, runtime, made.__setitem__
            )
        blocks = [made[i] for i in range(len(made))]
        zeros = self._zeros(outcome) if outcome.kept_blocks is None else {}
        hidden = None if outcome.non_block is None else width_of(outcome.non_block)
        return written_as(self.config, blocks, outcome.kept_blocks, self.layout, zeros, hidden)

    def with_units(self, keeps: Sequence[Mapping[str, np.ndarray]]) -> Written:
        """Return what is written of the units that stay.

        Args:
          keeps: Units that stay, bool [units] by block and group.
        """
        arch = self.model.arch
        biased = self.method.shape_change(self.model).biased
        blocks = []
        with record_programs(self._recorder):
            for i, keep in enumerate(keeps):
                block = self.model.blocks[i]
                if biased:
                    block = with_linears(block, self._with_biases(block, keep))
                blocks.append(remove_units(arch, block, keep))
        return written_as(self.config, blocks, None, self.layout, {})

    def _with_biases(self, block: Any, keep: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the readers that a repair gives a bias: those that lose units, but no expert's."""
        readers = {}
        for name, stays in keep.items():
            reader = self.model.arch.group(name).reader.name
            if expert_of(reader)[1] is None and not stays.all():
                linear = linear_of(block, reader)
                shape = jax.ShapeDtypeStruct(linear.w.shape[:1], linear.w.dtype)
                readers[reader] = linear.replace(b=shape)
        return readers

    def _zeros(self, outcome: Outcome) -> dict[tuple[int, str], int]:
        """Return the zeros that a method leaves in each linear, by block and slot."""
        if outcome.kept_experts is not None:
            return {}
        zeros = {}
        for i, (asked, block) in enumerate(
            zip(outcome.asked, self.model.blocks.specs, strict=True)  # type: ignore[attr-defined]
        ):
            removed = outcome.removed[i] if outcome.removed else {}
            for slot, fraction in asked.items():
                out, columns = linear_of(block, slot).w.shape
                if slot not in removed:
                    # Whole entries of each row, as the methods count; a threshold over a whole
                    # matrix removes up to one entry of each row more.
                    zeros[i, slot] = out * int(fraction * columns)
                elif not removed[slot].cut:
                    zeros[i, slot] = len(removed[slot].rows) * columns
        return zeros
