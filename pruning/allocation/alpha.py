"""AlphaPruning (Lu et al. 2024): blocks whose weights have heavier-tailed spectra keep more."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Block, Model, linear_of
from models.errors import InputError
from models.programs import Program
from models.sharding import to_host
from pruning.allocation.alpha_core import (
    best_exponent,
    block_fractions,
    eigenvalues,
    tail_exponents,
)
from pruning.allocation.figures import allocation_figures
from pruning.budget import all_shapes, block_sparsities, by_block, meet_sparsity
from pruning.types import Allocation, Layerwise, Request

_eigenvalues = Program(eigenvalues, "spectrum")
_tail_exponents = Program(tail_exponents, "power laws fitted")


def exponent(w: jax.Array, official: bool = False) -> float:
    """Return the power-law exponent alpha of a matrix's spectrum; small is heavy-tailed.

    Args:
      w: Matrix [out in].
      official: Bound where the tail begins as the authors' code does.
    """
    e = to_host(_eigenvalues(w))
    # Zeros alone go, as they have no logarithm. Without eigenvalues below 1e-8 the histogram's peak
    # moves, and up to a quarter of the exponents (docs/decisions/016-alpha-all-eigenvalues.md).
    e = e[e > 0]
    if len(e) < 2 or e[0] == e[-1]:
        return 0.0  # equal eigenvalues have no tail
    alphas, distances = _tail_exponents(jnp.asarray(e))
    return best_exponent(e, to_host(alphas), to_host(distances), official)


@dataclasses.dataclass(frozen=True)
class Alpha:
    """AlphaPruning (Lu et al. 2024): blocks with heavier-tailed spectra lose less.

    It reads no calibration data.

    Args:
      epsilon: The most that a block loses is (1 + epsilon) / (1 - epsilon) times the least.
      variant: "official" takes the lower limit of the authors' code for where a tail begins (which
        mostly is none) and may ask for more than all of a block; "corrected", the default, takes
        the limit that was meant and meets the sparsity to one unit.
    """

    epsilon: float = 0.1
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise InputError(f"alpha: epsilon={self.epsilon} must be at least 0 and less than 1")

    @property
    def reads_activations(self) -> bool:
        """Return that spectra are those of the weights."""
        return False

    def __call__(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        layerwise: Layerwise,
    ) -> Allocation:
        """Allocate by spectra, as `Allocator` says."""
        shapes, official = all_shapes(model), self.variant == "official"

        def visit(i: int, block: Block, stats: Any) -> tuple[Block, Any]:
            ws = {s.name: linear_of(block, s.name).w for s in model.arch.slots_of(block)}
            return block, {name: exponent(w, official) for name, w in ws.items()}

        # A spectrum needs the whole matrix, so nothing is split over devices.
        unsplit = dataclasses.replace(runtime, mesh=None)
        exponents = calibrate_blocks(
            model,
            tokens,
            unsplit,
            visit,
            watch={},  # no forward: weights alone are read
            propagate="pruned",
            name="fitting spectra",
            key=("spectra", self.variant),  # not epsilon: a sweep fits spectra once
        )
        means = np.array([np.mean(list(block.values())) for block in exponents])
        fractions = block_fractions(means, request.sparsity, self.epsilon)
        sizes = [sum(out * inputs for out, inputs in block.values()) for block in shapes]
        # Blocks may differ in size, so eta of eq. 3 comes from the mean over weights.
        fractions = fractions * request.sparsity / np.average(fractions, weights=np.array(sizes))
        if official:
            # The official code may ask for more than a block has: 104 % of tiny-opt's first block
            # at epsilon 0.3. It then removes all of it, and makes up for nothing elsewhere.
            budget = by_block(model, np.minimum(fractions, 1.0))
        else:
            budget = meet_sparsity(by_block(model, fractions), shapes, request.sparsity)
        sparsities = block_sparsities(budget, shapes)
        by_block_mean = [sum(block.values()) / len(block) for block in exponents]
        return Allocation(
            budget,
            {"alpha": exponents, "block_sparsity": sparsities},
            figures=allocation_figures(sparsities, request.sparsity, "exponent", by_block_mean),
        )
