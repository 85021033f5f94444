"""DSnoT (Zhang et al. 2024) as a refinement of any layer-wise rule; the maths is in `dsnot_core`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from calibration.observers import moments, pair
from models.arch import Arch
from models.errors import InputError
from pruning.types import Mask, Pruner, Refiner
from pruning.weights.dsnot_core import Settings, refine


@functools.cache
def refined(pruner: Pruner, s: Settings) -> Pruner:
    """The pruner with its masks refined; equal arguments give one object, so one compilation."""

    def solve(
        ws: Sequence[jax.Array], prepared: Any, counts: Sequence[jax.Array]
    ) -> list[tuple[jax.Array, Mask]]:
        first = pruner.solve(ws, prepared[0], counts)
        return [
            refine(w, new, kept, prepared[1], s) for w, (new, kept) in zip(ws, first, strict=True)
        ]

    def prepare(stats: Any) -> tuple[Any, Mapping[str, jax.Array]]:
        own, seen = stats if pruner.observer else (None, stats)
        prepared, notes = pruner.prepare(own)
        return (prepared, seen), notes

    return Pruner(pair(pruner.observer, moments) if pruner.observer else moments, solve, prepare)


def dsnot(cycles: int = 50, variant: Literal["corrected", "official"] = "corrected") -> Refiner:
    """DSnoT (Zhang et al. 2024): swaps of kept and removed weights after any method that prunes each linear on its own.

    Args:
      cycles: the most swaps in a row.
      variant: "official" refines the linears of attention only, as the released code does, by sums over a window and the variance
        within windows, and swaps until a row lacks less than 0.1 or all cycles are done. "corrected", the default, refines every
        linear, by means and variances over all tokens, and stops a row when a swap would not bring it nearer to its dense output.
    """
    if cycles < 1:
        raise InputError(f"dsnot: cycles={cycles} must be at least 1")
    settings = Settings(cycles, variant == "official")

    def refiner(arch: Arch, pruners: Mapping[str, Pruner]) -> dict[str, Pruner]:
        group = arch.group("neurons")
        members = {m.name for m in (group.reader, *group.writers)} if settings.official else set()
        left = {arch.tap(name) for name in members}
        return {tap: p if tap in left else refined(p, settings) for tap, p in pruners.items()}

    return refiner
