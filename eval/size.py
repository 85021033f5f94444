"""How large a model is, and how much of it is zero."""

import resource
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Model


class Size(NamedTuple):
    """Entries of a model. `nonzero`: of each block's prunable linears, weights that are not zero, by slot."""

    parameters: int
    nonzero: tuple[dict[str, int], ...]


@jax.jit
def _nonzero(w: jax.Array) -> jax.Array:
    return jnp.sum(w != 0, axis=1)  # a row's count fits an int32, a matrix's may not


def entries(tree: Any) -> int:
    """The number of array entries of a pytree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def measure(model: Model) -> Size:
    """Count a model's parameters and the non-zero weights of its linears, reading each block once."""
    total, nonzero = entries(model.non_block), []
    for block in model.blocks:
        total += entries(block)
        nonzero.append(
            {
                s.name: int(np.asarray(_nonzero(getattr(block, s.name).w)).sum())
                for s in model.arch.slots
            }
        )
    return Size(total, tuple(nonzero))


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, int | None]:
    """Most bytes held so far by this process on the host, and on the fullest device (None where it does not say, as on a CPU)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    found = [
        s["peak_bytes_in_use"]
        for d in devices
        if (s := d.memory_stats()) and "peak_bytes_in_use" in s
    ]
    return {"host": peak, "device": max(found, default=None)}
