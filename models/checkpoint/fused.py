"""Tensors that a checkpoint stores as one and the model uses as parts, such as Phi-3's qkv_proj.

A part is named after the whole with itself in brackets: "self_attn.qkv_proj[q].weight". The parts
lie below each other in the order of the parameters.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from models.checkpoint.tensors import WHOLE, Tensors

_PART = re.compile(r"\[\w+\]")


def stored_name(name: str) -> str:
    """Return the name of the tensor or module that a checkpoint has, for a part of it too.

    Args:
      name: Name of a tensor or module, or of a part.
    """
    return _PART.sub("", name)


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names by the tensor that holds them.

    Args:
      names: Names of tensors and parts, in the order of the parameters.

    Returns:
      Names of the parts of each stored tensor; the tensor's own name where it is whole.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(stored_name(name), []).append(name)
    return groups


def stored_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the stored tensors.

    Args:
      shapes: Shape of each tensor and part, in the order of the parameters.

    Returns:
      Shape of each stored tensor by name.
    """
    whole = {}
    for name, parts in parts_of(shapes).items():
        rows = sum(shapes[p][0] for p in parts)
        whole[name] = (rows, *shapes[parts[0]][1:]) if len(parts) > 1 else shapes[parts[0]]
    return whole


def join(tensors: Mapping[str, np.ndarray], order: Sequence[str]) -> dict[str, np.ndarray]:
    """Join parts to the tensors that a checkpoint stores.

    Args:
      tensors: Tensors and parts by name, all parts of a tensor among them.
      order: Names in the order of the parameters.

    Returns:
      Stored tensors by name.
    """
    groups = parts_of(name for name in order if name in tensors)
    return {
        name: tensors[parts[0]] if len(parts) == 1 else np.concatenate([tensors[p] for p in parts])
        for name, parts in groups.items()
    }


class Split:
    """`Tensors` in which the parts of fused tensors have their own names.

    Args:
      tensors: Tensors of the checkpoint, as stored.
      shapes: Shape of each tensor and part of the model, in the order of the parameters; the
        stored tensors must have the shapes that follow.
    """

    def __init__(self, tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]):
        self._tensors = tensors
        self._rows: dict[str, slice] = {}
        self.shapes: Mapping[str, tuple[int, ...]] = {**tensors.shapes, **shapes}
        self.dtypes: Mapping[str, str] = dict(tensors.dtypes) | {
            name: tensors.dtypes[stored_name(name)] for name in shapes
        }
        for parts in parts_of(shapes).values():
            first = 0
            for name in parts if len(parts) > 1 else ():
                self._rows[name] = slice(first, first + shapes[name][0])
                first += shapes[name][0]

    def read(self, name: str, rows: slice = WHOLE) -> np.ndarray:
        """Read a tensor, a part or some of its rows, see `Tensors.read`."""
        own = self._rows.get(name)
        if own is None:
            return self._tensors.read(name, rows)
        start, stop, _ = rows.indices(own.stop - own.start)
        return self._tensors.read(stored_name(name), slice(own.start + start, own.start + stop))
