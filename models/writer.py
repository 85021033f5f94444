"""Where blocks go: a Hugging Face checkpoint written block by block, never more than one shard of it in memory."""

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from models import forms, hf
from models.arch import Block, Ends, Model, Slot
from models.layers import Linear

SHARD_BYTES = 2 << 30
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
    """A checkpoint in the making: blocks go in one after the other, `finish` completes it.

    Shards are flushed as they fill, so no more than `shard_bytes` wait in memory. `parameters` counts what was put in. Blocks may have
    fewer heads and neurons than the configuration says, and more biases: `models.forms` finds the form that holds them.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        config: Mapping[str, Any],
        layout: forms.Layout = "auto",
        shard_bytes: int = SHARD_BYTES,
    ):
        self._directory, self._config, self._layout, self._limit = directory, dict(config), layout, shard_bytes
        self._buffer: dict[str, np.ndarray] = {}
        self._where: dict[str, int] = {}  # tensor -> shard
        self._stored: dict[str, tuple[int, ...]] = {}  # tensor -> shape
        self._size, self._total, self._shards = 0, 0, 0
        self._arch, self._ends, self._specs = hf.specs(config)
        self._shapes: list[forms.Shape] = []
        self._biases = set(self._arch.config.biases)
        self.parameters = 0
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, i: int, block: Block) -> None:
        """Write block `i`, the next one."""
        if i != len(self._shapes):
            raise ValueError(f"block {i} was put where block {len(self._shapes)} was due")
        self._shapes.append(forms.shape_of(self._arch, block))
        self._biases |= {s.name for s in self._arch.slots if getattr(block, s.name).b is not None}
        self._add(_named(self._specs[i], block, self._arch.slots), block)

    def _add(self, specs: Any, values: Any) -> None:
        names, arrays = jax.tree.leaves(specs, is_leaf=hf.is_spec), jax.tree.leaves(values)
        for spec, array in zip(names, arrays, strict=True):
            value = np.ascontiguousarray(array)
            if self._buffer and self._size + value.nbytes > self._limit:
                self._flush()
            self._buffer[spec.name], self._stored[spec.name] = value, value.shape
            self._size += value.nbytes
            self._total += value.nbytes
            self.parameters += value.size

    def _shard(self, k: int) -> pathlib.Path:
        return self._directory / f"shard-{k}.safetensors"

    def _flush(self) -> None:
        save_file(self._buffer, self._shard(self._shards), metadata={"format": "pt"})
        self._where |= dict.fromkeys(self._buffer, self._shards)
        self._buffer, self._size, self._shards = {}, 0, self._shards + 1

    def finish(self, ends: Ends, companions: pathlib.Path, kept: Sequence[int] | None = None) -> forms.Form:
        """Write the ends, `config.json`, the class that our own types need, the shard index if there are several, and copy tokenizer and
        generation files.

        Args:
          kept: the original index of every block that was put, where some were left out.
        Returns the form that was chosen; where it has one shape for all blocks, narrower ones are padded with zeros, which changes no
        output.
        """
        self._add(self._ends, ends)
        config = self._config if kept is None else hf.shallower(self._config, kept)
        form = forms.form(config, self._shapes, sorted(self._biases), self._layout)
        dtype = jax.tree.leaves(ends)[0].dtype
        config = forms.finished(form.config, str(dtype))
        wanted = {s.name: s.shape for s in jax.tree.leaves(hf.specs(config)[1:], is_leaf=hf.is_spec)}
        for name in wanted.keys() - self._stored.keys():  # biases that other blocks, or other linears, have
            self._buffer[name], self._stored[name] = np.zeros(wanted[name], dtype), wanted[name]
            self._total += self._buffer[name].nbytes
        self._flush()
        self._pad(wanted)
        self._name_shards()
        write_json(self._directory / "config.json", config)
        if form.code is not None:
            (self._directory / forms.CODE).write_text(form.code, encoding="utf-8")
        copy_companions(companions, self._directory, config)
        return form

    def _name_shards(self) -> None:
        """Give the shards their final names, with an index if there are several."""
        names = (
            ["model.safetensors"]
            if self._shards == 1
            else [f"model-{k + 1:05d}-of-{self._shards:05d}.safetensors" for k in range(self._shards)]
        )
        for k, name in enumerate(names):
            self._shard(k).rename(self._directory / name)
        if self._shards > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": {n: names[k] for n, k in sorted(self._where.items())}}
            write_json(self._directory / "model.safetensors.index.json", index)

    def _pad(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Grow what is narrower than `wanted` with zeros, shard by shard."""
        narrow = {n for n, shape in self._stored.items() if shape != wanted[n]}
        for k in {self._where[n] for n in narrow}:
            tensors = load_file(self._shard(k))
            for n in narrow & tensors.keys():
                tensors[n] = np.pad(tensors[n], [(0, w - h) for h, w in zip(tensors[n].shape, wanted[n], strict=True)])
                self._total += tensors[n].nbytes - tensors[n].itemsize * int(np.prod(self._stored[n]))
            save_file(tensors, self._shard(k), metadata={"format": "pt"})


def _named(specs: Block, block: Block, slots: Sequence[Slot]) -> Block:
    """The specs with a bias for those linears that have one in the block. ValueError where the block lacks one that it should have."""
    new = {}
    for name in (s.name for s in slots):
        spec, b = getattr(specs, name), getattr(block, name).b
        if b is None and spec.b is not None:
            raise ValueError(f"{spec.b.name} was lost")
        bias: Any = None if b is None else hf.Spec(spec.w.name.removesuffix("weight") + "bias", b.shape)
        new[name] = Linear(spec.w, bias)
    return specs.replace(**new)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON with a final newline; infinities and NaN as Python's json has them."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: pathlib.Path, target: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Copy the tokenizer's and generation's files of a checkpoint; what a `.gguf` file holds of them is written out."""
    if source.is_file():
        from models.gguf import gguf_tokenizer, gguf_tokenizer_config

        gguf_tokenizer(source).save(str(target / "tokenizer.json"))
        write_json(target / "tokenizer_config.json", gguf_tokenizer_config(source))
    else:
        for file in sorted({f for pattern in COPIED for f in source.glob(pattern) if f.is_file()}):
            shutil.copyfile(file, target / file.name)
    if not (target / "generation_config.json").exists():
        tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
        write_json(target / "generation_config.json", tokens)


def save(directory: pathlib.Path, model: Model, config: Mapping[str, Any], companions: pathlib.Path) -> None:
    """Write a whole model as a Hugging Face checkpoint; `companions` is where its tokenizer's files are."""
    writer = Writer(directory, config)
    for i, block in enumerate(model.blocks):
        writer.put(i, block)
    writer.finish(model.ends, companions)
