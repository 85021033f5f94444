"""Size of a model: entries, non-zero weights, and memory used so far."""

import resource
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Model, linear_of
from models.progress import Advance, no_advance


class Size(NamedTuple):
    """Size of a model.

    Attributes:
      parameters: Number of entries of all arrays.
      nonzero: Number of non-zero weights of each block's prunable linears, by slot.
    """

    parameters: int
    nonzero: tuple[dict[str, int], ...]


@jax.jit
def _nonzero_by_row(w: jax.Array) -> jax.Array:
    # By row, because the count of a whole matrix may exceed an int32.
    return jnp.sum(w != 0, axis=1)


def count_entries(tree: Any) -> int:
    """Count the array entries of a pytree.

    Args:
      tree: Pytree of arrays or of their shapes.

    Returns:
      Number of entries.
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def measure_size(model: Model, advance: Advance = no_advance) -> Size:
    """Count a model's entries and the non-zero weights of its linears, reading each block once.

    Args:
      model: Model.
      advance: Called after each block.

    Returns:
      Size.
    """
    total, nonzero = count_entries(model.non_block), []
    for block in model.blocks:
        total += count_entries(block)
        slots = [s.name for s in model.arch.slots_of(block)]
        counts = {name: _nonzero_by_row(linear_of(block, name).w) for name in slots}
        nonzero.append({name: int(np.asarray(rows).sum()) for name, rows in counts.items()})
        advance()
    return Size(total, tuple(nonzero))


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, int | None]:
    """Return the most bytes that this process has held so far.

    Args:
      devices: Devices to ask.

    Returns:
      Bytes on the "host", and on the fullest "device"; None where devices do not report it, as on
      a CPU.
    """
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    statistics = [device.memory_stats() or {} for device in devices]
    peaks = [s["peak_bytes_in_use"] for s in statistics if "peak_bytes_in_use" in s]
    return {"host": host, "device": max(peaks, default=None)}
