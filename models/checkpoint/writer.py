"""Hugging Face checkpoints written block by block, with at most one shard in memory."""

import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from models.arch import (
    Block,
    Model,
    NonBlockParams,
    experts_of,
    linear_of,
    with_linears,
)
from models.checkpoint.block_specs import bias_name, specs_of, with_biases
from models.checkpoint.companions import copy_companions, write_json
from models.checkpoint.formats import load_tensor
from models.checkpoint.fused import join, parts_of, stored_name
from models.checkpoint.output_format import (
    Form,
    Layout,
    Shape,
    choose_form,
    shape_of,
)
from models.checkpoint.own_code import CODE
from models.checkpoint.spelling import with_dtype
from models.checkpoint.stored import narrowed
from models.checkpoint.tensors import save_tensors
from models.families import hf
from models.layers import Linear
from models.processes import run_on_primary
from models.progress import Progress, no_progress
from models.sharding import to_host
from models.stream import fit_scale, width_of

SHARD_BYTES = 1 << 30  # a shard waits in host memory, and saving it takes as much again


class Writer:
    """A checkpoint in the making: `put` adds blocks in order and `finish` completes it.

    Blocks wait in memory until they fill half of `shard_bytes` or `mark` is called. Then they go to
    a file in `work`, from which `finish` makes the checkpoint, so `finish` can be killed and called
    again. Blocks may have fewer heads and neurons than the configuration, and more biases:
    `models.checkpoint.output_format` finds the form that holds them. Of several processes all put
    every block and the primary writes.

    Args:
      directory: Directory of the checkpoint, created if needed.
      config: Contents of the dense model's `config.json`.
      layout: "auto" or "padded", see `models.checkpoint.output_format.choose_form`.
      shard_bytes: Largest size of a weight file.
      work: Directory that outlives the process, for a `rewind`; None for one that `finish` removes.
      dtype: Name of the type to store, such as "float16"; None for that of the parameters.

    Attributes:
      dtype: Type to store; None for that of the parameters.
      remarks: After `finish`: sentences that the report's reader must see.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        config: Mapping[str, Any],
        layout: Layout = "auto",
        shard_bytes: int = SHARD_BYTES,
        work: pathlib.Path | None = None,
        dtype: str | None = None,
    ):
        self.remarks: tuple[str, ...] = ()
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self._directory = directory
        self._config = dict(config)
        self._layout = layout
        self._shard_bytes = shard_bytes
        self._work = work or directory / "unfinished"
        self._remove_work = work is None
        self._buffer: dict[str, np.ndarray] = {}
        self._arch, self._non_block_specs, self._block_specs = hf.specs(config)
        self._shapes: list[Shape] = []
        self._biases = set(self._arch.config.biases)
        # Kept as JSON-able values, because `mark` returns them.
        # Of each written shard: the tensors' shapes by name.
        self._shards: list[dict[str, list[int]]] = []
        # Biases of zeros that `finish` adds.
        self._added: set[str] = set()
        directory.mkdir(parents=True, exist_ok=True)
        self._work.mkdir(parents=True, exist_ok=True)

    @property
    def blocks(self) -> int:
        """Return the number of blocks that were put."""
        return len(self._shapes)

    @property
    def files(self) -> list[pathlib.Path]:
        """Return the files in `work` that hold blocks; each is written once."""
        return [self._shard_path(k) for k in range(len(self._shards))]

    @property
    def parameters(self) -> int:
        """Return the number of parameters that were put, without the biases that `finish` adds."""
        # From the shapes of the shards, which a rewind restores, rather than a counter.
        written = sum(
            math.prod(shape)
            for shard in self._shards
            for name, shape in shard.items()
            if name not in self._added
        )
        return written + sum(x.size for x in self._buffer.values())

    def put(self, i: int, block: Block) -> None:
        """Add the next block.

        Args:
          i: Index of the block, which must be `blocks`.
          block: Parameters of the block.

        Raises:
          ValueError: Another block is due, or the block lacks a bias of its configuration.
        """
        # Shards hold blocks in order, and a mark counts them.
        if i != self.blocks:
            raise ValueError(f"block {i} was put where block {self.blocks} was due")
        self._shapes.append(shape_of(self._arch, block))
        slots = self._arch.slots_of(block)
        self._biases |= {s.name for s in slots if linear_of(block, s.name).b is not None}
        specs = specs_of(self._config, self._block_specs[i], i, experts_of(block))
        self._add(with_biases(specs, block, slots), block)

    def _add(self, specs: Any, values: Any) -> None:
        """Put the arrays of a tree into the buffer under the names of its specs."""
        leaves, arrays = jax.tree.leaves(specs, is_leaf=hf.is_spec), jax.tree.leaves(values)
        named = {s.name: array for s, array in zip(leaves, arrays, strict=True)}
        # Parts of one stored tensor go into one shard.
        for parts in parts_of(named).values():
            # safetensors writes the memory as it lies, so views must be made contiguous.
            hosted = {
                name: np.ascontiguousarray(narrowed(name, to_host(named[name]), self.dtype))
                for name in parts
            }
            waiting = (*self._buffer.values(), *hosted.values())
            # Half of a shard, because saving takes as much memory again.
            if self._buffer and sum(x.nbytes for x in waiting) > self._shard_bytes // 2:
                self._flush()
            self._buffer |= hosted

    def _shard_path(self, k: int) -> pathlib.Path:
        return self._work / f"shard-{k}.safetensors"

    def _flush(self) -> None:
        """Write the buffer as the next shard and empty it."""
        if self._buffer:
            run_on_primary(self._save)
            self._shards.append({name: list(x.shape) for name, x in self._buffer.items()})
            self._buffer = {}

    def _save(self) -> None:
        """Write the buffer as the next shard."""
        path = self._shard_path(len(self._shards))
        save_tensors(self._buffer, path)
        # On the disk before a mark names it: a mark must survive a power cut.
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def mark(self) -> dict[str, Any]:
        """Write what waits and describe how far the checkpoint is.

        Returns:
          JSON-able mark for `rewind`.
        """
        self._flush()
        shapes = [list(s) for s in self._shapes]
        return {"blocks": shapes, "biases": sorted(self._biases), "shards": self._shards}

    def rewind(self, mark: Mapping[str, Any] | None) -> None:
        """Go back to a mark, also of a writer that was killed.

        Args:
          mark: Value of `mark`; None for a writer without blocks.
        """
        mark = mark or {"blocks": [], "biases": self._arch.config.biases, "shards": []}
        self._shapes = [Shape(*s) for s in mark["blocks"]]
        self._biases = set(mark["biases"])
        self._shards = list(mark["shards"])
        self._buffer = {}

    def stored(self) -> Iterator[Block]:
        """Read back the blocks that were put, in order, after a `rewind`.

        Yields:
          Parameters of a block.
        """
        shard_of = {name: k for k, shard in enumerate(self._shards) for name in shard}

        def load(spec: hf.Spec) -> jax.Array:
            return jnp.asarray(load_tensor(self._shard_path(shard_of[spec.name]), spec.name))

        for i, shape in enumerate(self._shapes):
            specs = specs_of(self._config, self._block_specs[i], i, shape.experts)
            linears = {}
            for slot in self._arch.slots_of(specs):
                spec = linear_of(specs, slot.name)
                name = bias_name(spec)
                # Any: a tree of specs has the type of the tree of arrays that it describes.
                bias: Any = hf.Spec(name, ()) if name in shard_of else None
                linears[slot.name] = Linear(spec.w, bias)
            yield jax.tree.map(load, with_linears(specs, linears), is_leaf=hf.is_spec)

    def finish(
        self,
        non_block: NonBlockParams,
        companions: pathlib.Path,
        kept: Sequence[int] | None = None,
        progress: Progress = no_progress,
    ) -> Form:
        """Complete the checkpoint.

        It has the weights, `config.json`, the class that our own types need, the shard index if
        there are several shards, and the tokenizer's and generation's files.

        Args:
          non_block: Parameters outside the blocks.
          companions: Checkpoint whose tokenizer and generation files are copied.
          kept: Original index of every block that was put, where some were left out; None for all.
          progress: Shows the progress.

        Returns:
          Form that was chosen. Where it has one shape for all blocks, narrower ones are padded with
          zeros, which changes no output.
        """
        config = self._config if kept is None else hf.shallower(self._config, kept)
        if width_of(non_block) != self._arch.config.dim:
            config = hf.narrower(config, width_of(non_block))
            non_block = fit_scale(non_block, self._arch.config, hf.specs(config)[0].config)
        self._add(self._non_block_specs, non_block)
        form = choose_form(config, self._shapes, sorted(self._biases), self._layout)
        dtype = self.dtype or jax.tree.leaves(non_block)[0].dtype
        config = with_dtype(form.config, str(dtype))
        wanted = {
            s.name: s.shape for s in jax.tree.leaves(hf.specs(config)[1:], is_leaf=hf.is_spec)
        }
        written = set(self._buffer).union(*self._shards)
        # Biases that the form has on every block or linear because some have one.
        self._added = set(wanted) - written
        self._buffer |= {name: np.zeros(wanted[name], dtype) for name in sorted(self._added)}
        self._flush()

        def complete() -> list[str]:
            # The weights first: a directory with config.json counts as a checkpoint.
            self._make_files(wanted, dtype.itemsize, progress)
            write_json(self._directory / "config.json", config)
            if form.code is not None:
                (self._directory / CODE).write_text(form.code, encoding="utf-8")
            remarks = copy_companions(companions, self._directory, config)
            if self._remove_work:
                shutil.rmtree(self._work)
            return remarks

        self.remarks = tuple(run_on_primary(complete))
        return form

    def _make_files(
        self, wanted: Mapping[str, tuple[int, ...]], itemsize: int, progress: Progress
    ) -> None:
        """Make the weight files: one if `shard_bytes` allow it, else one from each shard."""
        size = sum(math.prod(wanted[name]) for shard in self._shards for name in shard) * itemsize
        shards = list(range(len(self._shards)))
        # Shards in `work` are half as large, so a small model may have several.
        groups = [shards] if size <= self._shard_bytes else [[k] for k in shards]
        total = len(groups)
        advance = progress("writing the checkpoint", total, unit="files")
        weight_map: dict[str, str] = {}
        for g, members in enumerate(groups):
            name = f"model-{g + 1:05d}-of-{total:05d}.safetensors"
            if total == 1:
                name = "model.safetensors"
            for k in members:
                weight_map |= dict.fromkeys(map(stored_name, self._shards[k]), name)
            self._make_file(self._directory / name, members, wanted)
            advance()
        if total > 1:
            index = {
                "metadata": {"total_size": size},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self._directory / "model.safetensors.index.json", index)

    def _make_file(
        self, path: pathlib.Path, members: Sequence[int], wanted: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Make a weight file from shards, narrower tensors padded with zeros."""
        unchanged = all(
            tuple(shape) == wanted[name] for k in members for name, shape in self._shards[k].items()
        )
        fused = any(stored_name(name) != name for k in members for name in self._shards[k])
        if len(members) == 1 and unchanged and not fused:
            # A link, so that `finish` can be killed and called again while the shard stays.
            path.unlink(missing_ok=True)
            try:
                os.link(self._shard_path(members[0]), path)
            except OSError:  # a file system without links
                shutil.copyfile(self._shard_path(members[0]), path)
            return
        tensors: dict[str, np.ndarray] = {}
        for k in members:
            tensors |= load_file(self._shard_path(k))
        for name, x in tensors.items():
            if x.shape != wanted[name]:
                padding = [(0, w - h) for h, w in zip(x.shape, wanted[name], strict=True)]
                tensors[name] = np.pad(x, padding)
        save_tensors(join(tensors, list(wanted)), path)


def save(
    directory: pathlib.Path, model: Model, config: Mapping[str, Any], companions: pathlib.Path
) -> None:
    """Write a whole model as a Hugging Face checkpoint.

    Args:
      directory: Directory of the checkpoint.
      model: Model.
      config: Contents of `config.json`.
      companions: Checkpoint whose tokenizer and generation files are copied.
    """
    writer = Writer(directory, config)
    for i, block in enumerate(model.blocks):
        writer.put(i, block)
    writer.finish(model.non_block, companions)
