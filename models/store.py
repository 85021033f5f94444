"""Where blocks come from and where they go: a checkpoint read block by block, a checkpoint written block by block.

Reading never holds more than the block asked for; writing never more than one shard. The written directory is a plain Hugging Face
checkpoint that appears under its name only when it is complete.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from models import hf
from models.arch import Arch, Block, Ends, Model
from models.errors import InputError
from models.formats import open_tensors
from models.layers import Linear
from models.surgery import units
from models.tensors import Tensors

SHARD_BYTES = 2 << 30
# Buffers some exporters stored beside the weights, and a tied head stored twice: nothing is lost by leaving them unread.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
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


class Checkpoint(NamedTuple):
    """A model opened for reading: `model.blocks` reads a block each time it is indexed.

    `specs` has a Spec for every array of the blocks, `directory` (or a `.gguf` file) the tokenizer, `parameters` counts the model's
    arrays, `stored_bytes` its weight files.
    """

    model: Model
    config: dict[str, Any]
    specs: tuple[Block, ...]
    directory: pathlib.Path
    parameters: int
    stored_bytes: int


class LazyBlocks(Sequence[Block]):
    """A checkpoint's blocks, each read (and checked for non-finite numbers) when it is indexed, and kept nowhere.

    `specs` has their shapes: trees like the blocks with a Spec for every array.
    """

    def __init__(self, tensors: Tensors, specs: Sequence[Block], dtype: jnp.dtype):
        self._tensors, self.specs, self._dtype = tensors, specs, dtype

    def __len__(self) -> int:
        return len(self.specs)

    @overload
    def __getitem__(self, i: int) -> Block: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Block, ...]: ...
    def __getitem__(self, i: int | slice) -> Block | tuple[Block, ...]:
        if isinstance(i, slice):
            return tuple(self[j] for j in range(*i.indices(len(self))))
        return read(self._tensors, self.specs[i], self._dtype)


def _finite(value: np.ndarray) -> bool:
    """Whether all numbers of a tensor are finite in float32."""
    # The sum first: it is one pass without a boolean copy. In float32, as NumPy has no isfinite for every checkpoint type.
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.sum(np.abs(value), dtype=np.float32)) or np.isfinite(value.astype(np.float32)).all())


def read(tensors: Tensors, specs: Any, dtype: jnp.dtype) -> Any:
    """The parameters of a tree of specs, as arrays of `dtype` on the default device; InputError on NaN or infinity."""

    def one(spec: hf.Spec) -> jax.Array:
        value = tensors.read(spec.name)
        if not _finite(value):
            raise InputError(f"tensor {spec.name} holds NaN or infinity: fetch the checkpoint again, or mend it before pruning")
        return jnp.asarray(value, dtype)

    return jax.tree.map(one, specs, is_leaf=hf.is_spec)


class _Renamed:
    """Tensors of a checkpoint of the bare decoder, whose names lack the leading `model.`."""

    def __init__(self, tensors: Tensors):
        self._own = {n if n.startswith("lm_head.") else f"model.{n}": n for n in tensors.shapes}
        self._tensors = tensors
        self.shapes: Mapping[str, tuple[int, ...]] = {n: tensors.shapes[own] for n, own in self._own.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors.read(self._own[name])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check(tensors: Tensors, wanted: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    """InputError that names every kind of disagreement between a checkpoint and its configuration: missing, surplus, mis-shaped."""
    missing = [n for n in wanted if n not in tensors.shapes]
    if missing:
        raise InputError(f"the checkpoint lacks {_some(missing)}: fetch it again, or check that config.json belongs to it")
    for name, shape in wanted.items():
        if tuple(tensors.shapes[name]) != shape:
            raise InputError(
                f"tensor {name} has shape {list(tensors.shapes[name])}, config.json says {list(shape)}: they belong to different models"
            )
    surplus = [
        n for n in tensors.shapes if n not in wanted and not n.endswith(IGNORED_SUFFIXES) and not (tied and n == "lm_head.weight")
    ]
    if surplus:
        raise InputError(
            f"the checkpoint holds {_some(surplus)}, which config.json does not account for: they belong to different models"
        )


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory; InputError when it is absent or not a JSON object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory} has no config.json: --model must name a Hugging Face checkpoint directory") from None
    except (ValueError, OSError, RecursionError) as e:
        raise InputError(f"{path} cannot be read ({e}): fetch the checkpoint again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object: fetch the checkpoint again")
    return config


def open_checkpoint(path: pathlib.Path, dtype: jnp.dtype = jnp.float32) -> Checkpoint:
    """Open a checkpoint directory, or a `.gguf` file, checking every name and shape before any weight is read.

    Args:
      path: as `models.hub.resolve` returns it.
      dtype: of the parameters in memory, whatever is stored.
    Raises InputError for whatever is missing, surplus, mis-shaped, corrupt or unsupported.
    """
    if path.suffix == ".gguf":
        from models.gguf import open_gguf

        config, tensors = open_gguf(path)
        directory = path.parent
    else:
        config, tensors, directory = read_config(path), None, path
    arch, ends, blocks = hf.specs(config)
    tensors = open_tensors(directory) if tensors is None else tensors
    if not any(n.startswith("model.") for n in tensors.shapes):
        tensors = _Renamed(tensors)
    leaves = jax.tree.leaves((ends, blocks), is_leaf=hf.is_spec)
    check(tensors, {s.name: s.shape for s in leaves}, arch.config.tied)
    model = Model(arch, read(tensors, ends, dtype), LazyBlocks(tensors, blocks, dtype))
    size = sum(f.stat().st_size for f in weight_files(path))
    return Checkpoint(model, config, blocks, path, sum(math.prod(s.shape) for s in leaves), size)


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a checkpoint's weights: what its size on disk is."""
    if path.is_file():
        return [path]
    for pattern in ("model*.safetensors", "flax_model*.msgpack", "pytorch_model*.bin"):
        if found := sorted(path.glob(pattern)):
            return found
    return []


def in_memory(model: Model) -> Model:
    """The same model with all its blocks read: for small models, searches and notebooks."""
    return model._replace(blocks=tuple(model.blocks))


class Writer:
    """A checkpoint in the making: blocks go in one after the other, `finish` completes it.

    Shards are flushed as they fill, so no more than `shard_bytes` wait in memory. `parameters` counts what was put in.
    """

    def __init__(self, directory: pathlib.Path, config: Mapping[str, Any], shard_bytes: int = SHARD_BYTES):
        self._directory, self._config, self._limit = directory, dict(config), shard_bytes
        self._buffer: dict[str, np.ndarray] = {}
        self._where: dict[str, int] = {}  # tensor -> shard
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._size, self._total, self._shards = 0, 0, 0
        self._arch, self._ends, self._specs = hf.specs(config)
        self._biased: tuple[Block, ...] = ()  # specs with every bias, once a block has one more than the configuration says
        self._neurons = 1
        self.parameters = 0
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, i: int, block: Block) -> None:
        """Write block `i`. It may have fewer feed-forward neurons than the configuration says, and more biases."""
        self._neurons = max(self._neurons, units(block, self._arch.group("neurons")))
        specs = self._specs[i]
        if len(jax.tree.leaves(block)) > len(jax.tree.leaves(specs, is_leaf=hf.is_spec)):
            self._biased = self._biased or hf.specs(hf.biased(self._config))[2]
            specs = _present(self._biased[i], block)
        self._add(specs, block)

    def _add(self, specs: Any, values: Any) -> None:
        names, arrays = jax.tree.leaves(specs, is_leaf=hf.is_spec), jax.tree.leaves(values)
        if len(names) != len(arrays):
            raise ValueError(f"{len(arrays)} arrays for {len(names)} names of the checkpoint: a bias was lost")
        for spec, array in zip(names, arrays, strict=True):
            value = np.ascontiguousarray(array)
            if self._buffer and self._size + value.nbytes > self._limit:
                self._flush()
            self._buffer[spec.name], self._shapes[spec.name] = value, value.shape
            self._size += value.nbytes
            self._total += value.nbytes
            self.parameters += value.size

    def _shard(self, k: int) -> pathlib.Path:
        return self._directory / f"shard-{k}.safetensors"

    def _flush(self) -> None:
        save_file(self._buffer, self._shard(self._shards), metadata={"format": "pt"})
        self._where |= dict.fromkeys(self._buffer, self._shards)
        self._buffer, self._size, self._shards = {}, 0, self._shards + 1

    def finish(self, ends: Ends, companions: pathlib.Path, kept: Sequence[int] | None = None) -> bool:
        """Write the ends, `config.json`, the shard index if there are several, and copy tokenizer and generation files.

        Args:
          kept: the original index of every block that was put, where some were left out.
        The configuration gets the widest block's number of neurons; narrower blocks are padded to it with zeros, which changes no
        output and loads everywhere. Returns whether any had to be.
        """
        self._add(self._ends, ends)
        dtype = jax.tree.leaves(ends)[0].dtype
        config = hf.exported(hf.biased(self._config) if self._biased else self._config, self._neurons, str(dtype))
        config = config if kept is None else hf.shallower(config, kept)
        wanted = {s.name: s.shape for s in jax.tree.leaves(hf.specs(config)[1:], is_leaf=hf.is_spec)}
        for name in wanted.keys() - self._shapes.keys():  # biases that other blocks have
            self._buffer[name], self._shapes[name] = np.zeros(wanted[name], dtype), wanted[name]
            self._total += self._buffer[name].nbytes
        self._flush()
        padded = self._pad(wanted)
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
        write_json(self._directory / "config.json", config)
        copy_companions(companions, self._directory, config)
        return padded

    def _pad(self, wanted: Mapping[str, tuple[int, ...]]) -> bool:
        """Grow what is narrower than `wanted` with zeros, shard by shard."""
        narrow = {n for n, shape in self._shapes.items() if shape != wanted[n]}
        for k in {self._where[n] for n in narrow}:
            tensors = load_file(self._shard(k))
            for n in narrow & tensors.keys():
                tensors[n] = np.pad(tensors[n], [(0, w - h) for h, w in zip(tensors[n].shape, wanted[n], strict=True)])
                self._total += tensors[n].nbytes - tensors[n].itemsize * int(np.prod(self._shapes[n]))
            save_file(tensors, self._shard(k), metadata={"format": "pt"})
        return bool(narrow)


def _present(specs: Block, block: Block) -> Block:
    """The specs of those biases alone that the block has."""
    linears = {f.name: getattr(specs, f.name) for f in dataclasses.fields(specs) if isinstance(getattr(specs, f.name), Linear)}
    return specs.replace(**{name: s if getattr(block, name).b is not None else s.replace(b=None) for name, s in linears.items()})


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


def abstract(arch: Arch, ends: Ends, blocks: Sequence[Block], dtype: jnp.dtype = jnp.float32) -> Model:
    """A model of shapes alone, for `jax.eval_shape` and compilation without weights, from the specs of `models.hf.specs`."""

    def shape(tree: Any) -> Any:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), tree, is_leaf=hf.is_spec)

    return Model(arch, shape(ends), tuple(shape(b) for b in blocks))
