"""DSnoT (Zhang et al. 2024) as a refinement of any layer-wise rule."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from calibration.moments import moments
from calibration.observers import pair
from models.arch import Arch
from models.errors import InputError
from pruning.types import Mask, Pruner
from pruning.weights.dsnot_core import Settings, refine


# Cached: a pruner is a static argument of jit, and a fresh closure would compile again.
@functools.cache
def refined(pruner: Pruner, s: Settings) -> Pruner:
    """Return the pruner with its masks refined; equal arguments give one object.

    Args:
      pruner: The layer-wise rule.
      s: Settings of the swaps.
    """

    def solve(
        ws: Sequence[jax.Array], prepared: Any, counts: Sequence[jax.Array]
    ) -> list[tuple[jax.Array, Mask]]:
        own, input_moments = prepared
        pruned = pruner.solve(ws, own, counts)
        refined_pairs = []
        for w, (new, kept) in zip(ws, pruned, strict=True):
            with jax.named_scope("refine"):
                refined_pairs.append(refine(w, new, kept, input_moments, s))
        return refined_pairs

    def prepare(stats: Any) -> tuple[Any, Mapping[str, jax.Array]]:
        # Magnitude observes nothing. The swaps need moments after any rule.
        own, input_moments = stats if pruner.observer else (None, stats)
        prepared, notes = pruner.prepare(own)
        return (prepared, input_moments), notes

    # One pass over the tokens fills both statistics.
    return Pruner(pair(pruner.observer, moments) if pruner.observer else moments, solve, prepare)


@dataclasses.dataclass(frozen=True)
class DSnoT:
    """DSnoT (Zhang et al. 2024): swap kept and removed weights after any per-linear method.

    Args:
      cycles: The most swaps in a row.
      variant: "official" refines the linears of attention only, as the authors' code does, by sums
        over a window and the variance within windows, and swaps until a row lacks less than 0.1 or
        all cycles are done. "corrected", the default, refines every linear, by means and variances
        over all tokens, and stops a row when a swap would not bring it nearer to its dense output.
    """

    cycles: int = 50  # the official number
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise InputError(f"dsnot: cycles={self.cycles} must be at least 1")

    @property
    def reads_activations(self) -> bool:
        """Return that swaps go by moments of the inputs."""
        return True

    def __call__(self, arch: Arch, pruners: Mapping[str, Pruner]) -> dict[str, Pruner]:
        """Refine the masks of each tap's pruner, as `Refiner` says."""
        settings = Settings(self.cycles, self.variant == "official")
        skipped: set[str] = set()
        if settings.official:
            neurons = [group for group in arch.groups if group.kind == "neurons"]
            # The official code overwrites the option that names the layers to skip, and so never
            # refines a feed-forward part.
            members = (m for group in neurons for m in (group.reader, *group.writers))
            skipped = {arch.tap(member.name) for member in members}
        return {
            tap: pruner if tap in skipped else refined(pruner, settings)
            for tap, pruner in pruners.items()
        }
