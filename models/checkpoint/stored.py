"""Head and type of a checkpoint's numbers, where `config.json` does not tell."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import ml_dtypes
import numpy as np

from models.checkpoint.tensors import WHOLE, Tensors
from models.errors import InputError

HEAD = "lm_head.weight"
T = TypeVar("T")

# Types that a model can be stored in without losing anything, narrower than float32.
_NARROW = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Settled(NamedTuple):
    """A checkpoint whose head is settled.

    Attributes:
      config: Contents of `config.json`; `tie_word_embeddings` says what the tensors do.
      tensors: Tensors, with the embedding under its own name.
      remarks: Sentences that the report's reader must see.
    """

    config: dict[str, Any]
    tensors: Tensors
    remarks: tuple[str, ...] = ()


class Renamed:
    """`Tensors` of which some have another name.

    Args:
      tensors: The tensors.
      names: Name of each tensor -> its name among the tensors.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self.tensors = tensors
        self.names = names
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensors.shapes[stored] for name, stored in names.items()
        }
        self.dtypes: Mapping[str, str] = {
            name: tensors.dtypes[stored] for name, stored in names.items()
        }

    def read(self, name: str, rows: slice = WHOLE) -> np.ndarray:
        """Read a tensor or some of its rows, see `Tensors.read`."""
        return self.tensors.read(self.names[name], rows)


def stored_names(tensors: Tensors) -> dict[str, str]:
    """Return the name of each tensor in its checkpoint.

    Args:
      tensors: Tensors, of which some may have another name.
    """
    if not isinstance(tensors, Renamed):
        return {name: name for name in tensors.shapes}
    inner = stored_names(tensors.tensors)
    return {name: inner[stored] for name, stored in tensors.names.items()}


# Beginnings of the names of a language model's tensors within a larger model -> their own.
_TEXT_PARTS = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}


# Parts of a larger model that are read.
_KEPT = {"language_model", "lm_head"}


def text_part(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Give the tensors of a larger model's language model its own names, and leave out the rest.

    Args:
      tensors: Tensors of the checkpoint, such as those of a model that sees images.

    Returns:
      Tensors, and sentences about what was left out; unchanged for a language model alone.
    """
    names: dict[str, str] = {}
    for name in tensors.shapes:
        for beginning, own in _TEXT_PARTS.items():
            if name.startswith(beginning):
                names[own + name.removeprefix(beginning)] = name
    if not names:
        return tensors, ()
    if HEAD in tensors.shapes:
        names.setdefault(HEAD, HEAD)
    left_out = sorted({n.split(".")[n.startswith("model.")] for n in tensors.shapes} - _KEPT)
    remark = (
        f"only the text part of the checkpoint was read; {', '.join(left_out) or 'nothing'} was "
        "left out, and the result is a language model without it"
    )
    return Renamed(tensors, names), (remark,)


def with_prefix(tensors: Tensors, names: Sequence[str]) -> Tensors:
    """Give the tensors of a bare decoder the names that they have in a language model.

    Args:
      tensors: Tensors of the checkpoint.
      names: Names of a language model's tensors.

    Returns:
      The tensors; unchanged if one of them already begins with `model.`.
    """
    if any(name.startswith("model.") for name in tensors.shapes):
        return tensors
    # Heads lie beside the decoder, so their names never had the prefix.
    parts = {n.split(".")[1] for n in names if n.startswith("model.")}
    return Renamed(
        tensors,
        {f"model.{n}" if n.split(".")[0] in parts else n: n for n in tensors.shapes},
    )


def settle_head(config: Mapping[str, Any], tensors: Tensors, embedding: str) -> Settled:
    """Find out whether a head that `config.json` calls tied is the embedding, as transformers 5.

    Args:
      config: Contents of `config.json`, which tie the head to the embedding.
      tensors: Tensors of the checkpoint.
      embedding: Name of the embedding.

    Returns:
      The checkpoint with one matrix where it holds one, or two equal ones; with a head of its own
      where it holds two that differ.
    """
    own = dict(config)
    if HEAD not in tensors.shapes:
        return Settled(own, tensors)
    if embedding not in tensors.shapes:
        # Some exporters write a shared matrix once, under the head's name.
        return Settled(own, Renamed(tensors, {embedding: HEAD} | {n: n for n in tensors.shapes}))
    if _equal(tensors, embedding, HEAD):
        return Settled(own, tensors)
    remark = (
        "config.json ties the head to the embedding, but the checkpoint holds a head that differs: "
        "it was used and written as a head of its own, as transformers 5 does"
    )
    return Settled(own | {"tie_word_embeddings": False}, tensors, (remark,))


def _equal(tensors: Tensors, a: str, b: str) -> bool:
    """Return whether two tensors hold the same numbers."""
    if tensors.shapes[a] != tensors.shapes[b]:
        return False
    x, y = tensors.read(a), tensors.read(b)
    if x.dtype != y.dtype:
        # NumPy compares no float16 with a bfloat16.
        x, y = x.astype(np.float32), y.astype(np.float32)
    return np.array_equal(x, y)


def exact_dtype(tensors: Tensors, names: Sequence[str]) -> str:
    """Return the narrowest type that holds all tensors exactly: "float16", "bfloat16" or "float32".

    Args:
      tensors: Tensors of the checkpoint.
      names: Those that belong to the model.
    """
    matrices = {tensors.dtypes[n] for n in names if len(tensors.shapes[n]) > 1}
    if len(matrices) != 1 or not matrices <= _NARROW.keys():
        return "float32"
    (dtype,) = matrices
    # GGUF files keep norms in float32 beside matrices of 16 bits; a short read tells.
    others = [n for n in names if tensors.dtypes[n] != dtype]
    return dtype if all(_fits(tensors.read(n), _NARROW[dtype]) for n in others) else "float32"


def _fits(x: np.ndarray, dtype: Any) -> bool:
    """Return whether a type holds all numbers of an array exactly."""
    with np.errstate(over="ignore"):
        return np.array_equal(x.astype(dtype).astype(x.dtype), x)


def narrowed(name: str, value: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Return an array in the type to store.

    Args:
      name: Name of the tensor.
      value: The array.
      dtype: The type; None for the array's own.

    Raises:
      InputError: A number is too large for the type.
    """
    if dtype is None or value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        stored = value.astype(dtype)
    if not np.isfinite(stored.astype(np.float32)).all():
        raise InputError(
            f"stores the source's {dtype}, and {name} holds a number too large for it",
            "give float32",
            field="dtype",
        )
    return stored


def rounded(parameters: T, dtype: np.dtype | None) -> T:
    """Return parameters as they will be read back, in the types that they came in.

    Args:
      parameters: Parameters of a block, or those outside the blocks.
      dtype: The type to store; None for their own.
    """
    if dtype is None:
        return parameters
    return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), parameters)
