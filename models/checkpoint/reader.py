"""Where blocks come from: a checkpoint read block by block, never more of it held than the block asked for."""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.arch import Arch, Block, Model, NonBlockParams
from models.checkpoint.formats import open_tensors
from models.checkpoint.tensors import WHOLE, Tensors
from models.errors import InputError
from models.families import hf
from models.sharding import own_rows, place

# Buffers some exporters stored beside the weights, and a tied head stored twice: nothing is lost by leaving them unread.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")


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


class ReadBlocks(Sequence[Block]):
    """Blocks that are read when they are indexed: a subclass says how many there are, and how one is read."""

    def read(self, i: int) -> Block:
        """Block i, 0 <= i < len(self)."""
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> Block: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Block, ...]: ...
    def __getitem__(self, i: int | slice) -> Block | tuple[Block, ...]:
        every = range(len(self))
        return (
            tuple(self.read(j) for j in every[i]) if isinstance(i, slice) else self.read(every[i])
        )


class LazyBlocks(ReadBlocks):
    """A checkpoint's blocks, each read (and checked for non-finite numbers) when it is asked for, and kept nowhere.

    `specs` has their shapes: trees like the blocks with a Spec for every array.
    """

    def __init__(self, tensors: Tensors, specs: Sequence[Block], dtype: jnp.dtype):
        self._tensors, self.specs, self._dtype = tensors, specs, dtype

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def nbytes(self) -> int:
        """What all of them would take in memory."""
        numbers = sum(math.prod(s.shape) for s in jax.tree.leaves(self.specs, is_leaf=hf.is_spec))
        return numbers * jnp.dtype(self._dtype).itemsize

    def read(self, i: int) -> Block:
        """Block i on the default device, in the type that was asked for."""
        return self.placed(self.fetch(i))

    def __iter__(self) -> Iterator[Block]:
        return prefetch(self)

    def fetch(self, i: int, mesh: Mesh | None = None) -> Block:
        """Block i in host memory, in the type it is stored in; rows that the mesh gives to other processes alone are not read, but zero."""
        return fetch(self._tensors, self.specs[i], mesh)

    def placed(self, block: Block, mesh: Mesh | None = None) -> Block:
        """A block that was fetched, on the mesh or else the default device, in the type that was asked for."""
        return _placed(block, self._dtype, mesh)


class ShapeBlocks(LazyBlocks):
    """Blocks of shapes, in place of a checkpoint's, for a planned run.

    Args:
      specs: Specs of every block.
      dtype: Type of the parameters in memory.
    """

    def __init__(self, specs: Sequence[Block], dtype: jnp.dtype) -> None:
        self.specs, self._dtype = specs, dtype

    def fetch(self, i: int, mesh: Mesh | None = None) -> Block:
        """Return block i as shapes."""
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, self._dtype),
            self.specs[i],
            is_leaf=hf.is_spec,
        )

    def placed(self, block: Block, mesh: Mesh | None = None) -> Block:
        """Return a fetched block as planned arrays on the mesh."""
        return place(block, mesh)


def prefetch(
    blocks: Sequence[Block], order: Sequence[int] | None = None, mesh: Mesh | None = None
) -> Iterator[Block]:
    """blocks[i] for every i of `order` (None: all of them), placed on the mesh; a checkpoint's next one is read into host memory while the
    caller works on this one."""
    order = range(len(blocks)) if order is None else order
    if not isinstance(blocks, LazyBlocks):
        yield from (place(blocks[i], mesh) for i in order)
        return
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        reading = [reader.submit(blocks.fetch, i, mesh) for i in order[:1]]
        for k in range(len(order)):
            placed = [blocks.placed(reading.pop().result(), mesh)]
            reading += [reader.submit(blocks.fetch, i, mesh) for i in order[k + 1 : k + 2]]
            yield placed.pop()  # nothing of it is held here while the caller works


def _finite(value: np.ndarray) -> bool:
    """Whether all numbers of a tensor are finite in float32."""
    # The sum first: it is one pass without a boolean copy. In float32, as NumPy has no isfinite for every checkpoint type.
    with np.errstate(over="ignore"):
        return bool(
            np.isfinite(np.sum(np.abs(value), dtype=np.float32))
            or np.isfinite(value.astype(np.float32)).all()
        )


def fetch(tensors: Tensors, specs: Any, mesh: Mesh | None = None) -> Any:
    """The parameters of a tree of specs, as they are stored and `LazyBlocks.fetch` says; InputError on NaN or infinity."""

    def one(spec: hf.Spec) -> np.ndarray:
        rows = own_rows(spec.shape, mesh)
        value = tensors.read(spec.name, rows)
        if not _finite(value):
            raise InputError(
                f"tensor {spec.name} holds NaN or infinity: fetch the checkpoint again, or mend it before pruning"
            )
        if rows == WHOLE:
            return value
        whole = np.zeros(spec.shape, value.dtype)  # memory that is not written to is not taken
        whole[rows] = value
        return whole

    return jax.tree.map(one, specs, is_leaf=hf.is_spec)


def _placed(values: Any, dtype: jnp.dtype, mesh: Mesh | None = None) -> Any:
    if mesh is None or mesh.size == 1:
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), values)
    return jax.tree.map(lambda x: x.astype(dtype), place(values, mesh))


class _Renamed:
    """Tensors of a checkpoint of the bare decoder, whose names lack the leading `model.`."""

    def __init__(self, tensors: Tensors):
        self._own = {n if n.startswith("lm_head.") else f"model.{n}": n for n in tensors.shapes}
        self._tensors = tensors
        self.shapes: Mapping[str, tuple[int, ...]] = {
            n: tensors.shapes[own] for n, own in self._own.items()
        }

    def read(self, name: str, rows: slice = WHOLE) -> np.ndarray:
        return self._tensors.read(self._own[name], rows)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check(tensors: Tensors, wanted: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    """InputError that names every kind of disagreement between a checkpoint and its configuration: missing, surplus, mis-shaped."""
    missing = [n for n in wanted if n not in tensors.shapes]
    if missing:
        raise InputError(
            f"the checkpoint lacks {_some(missing)}: fetch it again, or check that config.json belongs to it"
        )
    for name, shape in wanted.items():
        if tuple(tensors.shapes[name]) != shape:
            raise InputError(
                f"tensor {name} has shape {list(tensors.shapes[name])}, config.json says {list(shape)}: they belong to different models"
            )
    surplus = [
        n
        for n in tensors.shapes
        if n not in wanted
        and not n.endswith(IGNORED_SUFFIXES)
        and not (tied and n == "lm_head.weight")
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
        raise InputError(
            f"{directory} has no config.json: --model must name a Hugging Face checkpoint directory"
        ) from None
    except (ValueError, OSError, RecursionError) as e:
        raise InputError(f"{path} cannot be read ({e}): fetch the checkpoint again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object: fetch the checkpoint again")
    return config


def open_checkpoint(path: pathlib.Path, dtype: jnp.dtype = jnp.float32) -> Checkpoint:
    """Open a checkpoint directory, or a `.gguf` file, checking every name and shape before any weight is read.

    Args:
      path: as `models.checkpoint.hub.resolve` returns it.
      dtype: of the parameters in memory, whatever is stored.
    Raises InputError for whatever is missing, surplus, mis-shaped, corrupt or unsupported.
    """
    if path.suffix == ".gguf":
        from models.checkpoint.gguf import open_gguf

        config, tensors = open_gguf(path)
        directory = path.parent
    else:
        config, tensors, directory = read_config(path), None, path
    arch, non_block, blocks = hf.specs(config)
    tensors = open_tensors(directory) if tensors is None else tensors
    if not any(n.startswith("model.") for n in tensors.shapes):
        tensors = _Renamed(tensors)
    leaves = jax.tree.leaves((non_block, blocks), is_leaf=hf.is_spec)
    check(tensors, {s.name: s.shape for s in leaves}, arch.config.tied)
    model = Model(
        arch, _placed(fetch(tensors, non_block), dtype), LazyBlocks(tensors, blocks, dtype)
    )
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


def abstract(
    arch: Arch, non_block: NonBlockParams, blocks: Sequence[Block], dtype: jnp.dtype = jnp.float32
) -> Model:
    """A model of shapes alone, for `jax.eval_shape` and compilation without weights, from the specs of `models.families.hf.specs`."""

    def shape(tree: Any) -> Any:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, dtype), tree, is_leaf=hf.is_spec
        )

    return Model(arch, shape(non_block), tuple(shape(b) for b in blocks))
