"""Where blocks go: a Hugging Face checkpoint written block by block, never more than one shard of it in memory."""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from models.arch import Block, Model, NonBlockParams, Slot
from models.checkpoint import output_format as forms
from models.checkpoint.formats import load_tensor
from models.errors import damaged
from models.families import hf
from models.layers import Linear
from models.processes import run_on_primary
from models.sharding import to_host

SHARD_BYTES = 1 << 30
METADATA = {"format": "pt"}
# The tokenizer's files and the generation settings, by the names that transformers gives them.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


class Writer:
    """A checkpoint in the making: blocks go in one after the other, `finish` completes it. Of several processes, which all put every block,
    the first writes.

    Blocks wait in memory until there are half of `shard_bytes` of them (saving takes as much again), or a `mark` is set; then they go to a
    file in `work`, from which `finish` makes the checkpoint, so that it can be killed and called again. `parameters` counts what was put
    in. Blocks may have fewer heads and neurons than the configuration says, and more biases: `models.checkpoint.output_format` finds the form that holds
    them.

    Args:
      work: a directory that survives for a `rewind`; None: one that `finish` removes.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        config: Mapping[str, Any],
        layout: forms.Layout = "auto",
        shard_bytes: int = SHARD_BYTES,
        work: pathlib.Path | None = None,
    ):
        self._directory, self._config, self._layout, self._limit = (
            directory,
            dict(config),
            layout,
            shard_bytes,
        )
        self._work, self._passing = work or directory / "unfinished", work is None
        self._buffer: dict[str, np.ndarray] = {}
        self._arch, self._ends, self._specs = hf.specs(config)
        self._shapes: list[forms.Shape] = []
        self._biases = set(self._arch.config.biases)
        self._shards: list[dict[str, list[int]]] = []  # of each written file, the tensors' shapes
        self._sizes: list[int] = []  # and its bytes
        self._filled: set[str] = set()  # biases of zeros that `finish` adds
        directory.mkdir(parents=True, exist_ok=True)
        self._work.mkdir(parents=True, exist_ok=True)

    @property
    def blocks(self) -> int:
        """How many blocks were put."""
        return len(self._shapes)

    @property
    def parameters(self) -> int:
        """Numbers that were put in."""
        written = sum(
            math.prod(shape)
            for shard in self._shards
            for name, shape in shard.items()
            if name not in self._filled
        )
        return written + sum(x.size for x in self._buffer.values())

    def put(self, i: int, block: Block) -> None:
        """Write block `i`, the next one."""
        if i != self.blocks:
            raise ValueError(f"block {i} was put where block {self.blocks} was due")
        self._shapes.append(forms.shape_of(self._arch, block))
        self._biases |= {s.name for s in self._arch.slots if getattr(block, s.name).b is not None}
        self._add(_named(self._specs[i], block, self._arch.slots), block)

    def _add(self, specs: Any, values: Any) -> None:
        names, arrays = jax.tree.leaves(specs, is_leaf=hf.is_spec), jax.tree.leaves(values)
        for spec, array in zip(names, arrays, strict=True):
            value = np.ascontiguousarray(to_host(array))
            if (
                self._buffer
                and sum(x.nbytes for x in self._buffer.values()) + value.nbytes > self._limit // 2
            ):
                self._flush()
            self._buffer[spec.name] = value

    def _shard(self, k: int) -> pathlib.Path:
        return self._work / f"shard-{k}.safetensors"

    def _flush(self) -> None:
        if self._buffer:
            self._sizes.append(run_on_primary(self._save))
            self._shards.append({name: list(x.shape) for name, x in self._buffer.items()})
            self._buffer = {}

    def _save(self) -> int:
        """Write what waits as the next shard; its bytes."""
        path = self._shard(len(self._shards))
        save_file(self._buffer, path, metadata=METADATA)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return path.stat().st_size

    def mark(self) -> dict[str, Any]:
        """Write what waits, and say how far the checkpoint is: JSON-able."""
        self._flush()
        shapes = [list(s) for s in self._shapes]
        return {
            "blocks": shapes,
            "biases": sorted(self._biases),
            "shards": self._shards,
            "sizes": self._sizes,
        }

    def rewind(self, mark: Mapping[str, Any]) -> None:
        """Go back to a mark, of a writer that was killed too. InputError for a file that is gone or cut short."""
        self._shapes, self._biases = [forms.Shape(*s) for s in mark["blocks"]], set(mark["biases"])
        self._shards, self._sizes, self._buffer = list(mark["shards"]), list(mark["sizes"]), {}
        for k, size in enumerate(self._sizes):
            path = self._shard(k)
            if not path.is_file() or path.stat().st_size != size:
                raise damaged(path)

    def stored(self) -> Iterator[Block]:
        """The blocks that were put, read back in order after a `rewind`."""
        where = {name: k for k, shard in enumerate(self._shards) for name in shard}
        for specs in self._specs[: self.blocks]:
            new = {}
            for name in (s.name for s in self._arch.slots):
                spec = getattr(specs, name)
                bias = _bias_name(spec)
                new[name] = Linear(spec.w, hf.Spec(bias, ()) if bias in where else None)  # type: ignore[arg-type]
            yield jax.tree.map(
                lambda s: jnp.asarray(load_tensor(self._shard(where[s.name]), s.name)),
                specs.replace(**new),
                is_leaf=hf.is_spec,
            )

    def finish(
        self, non_block: NonBlockParams, companions: pathlib.Path, kept: Sequence[int] | None = None
    ) -> forms.Form:
        """Write the ends, `config.json`, the class that our own types need, the shard index if there are several, and copy tokenizer and
        generation files.

        Args:
          kept: the original index of every block that was put, where some were left out.
        Returns the form that was chosen; where it has one shape for all blocks, narrower ones are padded with zeros, which changes no
        output.
        """
        self._add(self._ends, non_block)
        config = self._config if kept is None else hf.shallower(self._config, kept)
        form = forms.form(config, self._shapes, sorted(self._biases), self._layout)
        dtype = jax.tree.leaves(non_block)[0].dtype
        config = forms.finished(form.config, str(dtype))
        wanted = {
            s.name: s.shape for s in jax.tree.leaves(hf.specs(config)[1:], is_leaf=hf.is_spec)
        }
        held = set(self._buffer).union(*self._shards)
        self._filled = set(wanted) - held  # other blocks, or other linears, have them
        self._buffer |= {name: np.zeros(wanted[name], dtype) for name in sorted(self._filled)}
        self._flush()

        def complete() -> None:
            self._make_files(wanted, dtype.itemsize)
            write_json(self._directory / "config.json", config)
            if form.code is not None:
                (self._directory / forms.CODE).write_text(form.code, encoding="utf-8")
            copy_companions(companions, self._directory, config)
            if self._passing:
                shutil.rmtree(self._work)

        run_on_primary(complete)
        return form

    def _make_files(self, wanted: Mapping[str, tuple[int, ...]], itemsize: int) -> None:
        """The checkpoint's files: one if `shard_bytes` allow it, else the shards; narrower tensors are padded to the shapes wanted."""
        size = sum(math.prod(wanted[name]) for shard in self._shards for name in shard) * itemsize
        every = list(range(len(self._shards)))
        groups = [every] if size <= self._limit else [[k] for k in every]
        total, where = len(groups), dict[str, str]()
        for g, members in enumerate(groups):
            name = (
                "model.safetensors"
                if total == 1
                else f"model-{g + 1:05d}-of-{total:05d}.safetensors"
            )
            where |= dict.fromkeys((tensor for k in members for tensor in self._shards[k]), name)
            self._make_file(self._directory / name, members, wanted)
        if total > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            write_json(self._directory / "model.safetensors.index.json", index)

    def _make_file(
        self, path: pathlib.Path, members: Sequence[int], wanted: Mapping[str, tuple[int, ...]]
    ) -> None:
        as_they_are = all(
            tuple(shape) == wanted[name] for k in members for name, shape in self._shards[k].items()
        )
        if len(members) == 1 and as_they_are:
            path.unlink(missing_ok=True)
            try:
                os.link(self._shard(members[0]), path)
            except OSError:  # a file system without links
                shutil.copyfile(self._shard(members[0]), path)
            return
        tensors = {name: x for k in members for name, x in load_file(self._shard(k)).items()}
        for name in [n for n, x in tensors.items() if x.shape != wanted[n]]:
            fill = [(0, w - h) for h, w in zip(tensors[name].shape, wanted[name], strict=True)]
            tensors[name] = np.pad(tensors[name], fill)
        save_file(tensors, path, metadata=METADATA)


def _bias_name(spec: Any) -> str:
    """The name of a linear's bias, whether it has one or not."""
    return spec.w.name.removesuffix("weight") + "bias"


def _named(specs: Block, block: Block, slots: Sequence[Slot]) -> Block:
    """The specs with a bias for those linears that have one in the block. ValueError where the block lacks one that it should have."""
    new = {}
    for name in (s.name for s in slots):
        spec, b = getattr(specs, name), getattr(block, name).b
        if b is None and spec.b is not None:
            raise ValueError(f"{spec.b.name} was lost")
        bias: Any = None if b is None else hf.Spec(_bias_name(spec), b.shape)
        new[name] = Linear(spec.w, bias)
    return specs.replace(**new)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON with a final newline; infinities and NaN as Python's json has them."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: pathlib.Path, target: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Copy the tokenizer's and generation's files of a checkpoint; what a `.gguf` file holds of them is written out."""
    if source.is_file():
        from models.checkpoint.gguf import gguf_tokenizer, gguf_tokenizer_config

        gguf_tokenizer(source).save(str(target / "tokenizer.json"))
        write_json(target / "tokenizer_config.json", gguf_tokenizer_config(source))
    else:
        for file in sorted({f for pattern in COPIED for f in source.glob(pattern) if f.is_file()}):
            shutil.copyfile(file, target / file.name)
    if not (target / "generation_config.json").exists():
        tokens = {
            k: config[k]
            for k in ("bos_token_id", "eos_token_id", "pad_token_id")
            if config.get(k) is not None
        }
        write_json(target / "generation_config.json", tokens)


def save(
    directory: pathlib.Path, model: Model, config: Mapping[str, Any], companions: pathlib.Path
) -> None:
    """Write a whole model as a Hugging Face checkpoint; `companions` is where its tokenizer's files are."""
    writer = Writer(directory, config)
    for i, block in enumerate(model.blocks):
        writer.put(i, block)
    writer.finish(model.non_block, companions)
