"""AlphaPruning (Lu et al. 2024): blocks whose weights have heavier-tailed spectra are better trained, and keep more."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Block, Model
from models.errors import InputError
from models.programs import Program
from models.sharding import to_host
from pruning.allocation.alpha_core import eigenvalues, fractions, limits, tail_exponents
from pruning.allocation.figures import allocation_figures
from pruning.budget import all_shapes, block_means, by_block, exact
from pruning.types import Allocation, Allocator, Layerwise, Request

_eigenvalues = Program(eigenvalues, "spectrum")
_tail_exponents = Program(tail_exponents, "power laws fitted")


def exponent(w: jax.Array, official: bool = False) -> float:
    """The power-law exponent alpha of the spectrum of W [out in], where the power law fits best; small is heavy-tailed."""
    e = to_host(_eigenvalues(w))
    e = e[e > 0]
    if len(e) < 2 or e[0] == e[-1]:
        return 0.0  # no spectrum to speak of
    alpha, distance = (to_host(x) for x in _tail_exponents(jnp.asarray(e)))
    least, most = limits(e, official)
    begins = (e >= least) & (e <= most) & (alpha > 1) & (np.arange(len(e)) < len(e) - 1)
    return float(alpha[np.argmin(np.where(begins, distance, 1.0))])


def alpha(
    epsilon: float = 0.1, variant: Literal["corrected", "official"] = "corrected"
) -> Allocator:
    """AlphaPruning (Lu et al. 2024): the block whose weights have the heaviest-tailed spectra loses least. No calibration data.

    Args:
      epsilon: the most that a block loses is (1 + epsilon) / (1 - epsilon) times the least.
      variant: "official" takes the released code's lower limit of where a tail begins (which mostly is none) and may ask for more than
        all of a block; "corrected", the default, takes the limit that was meant and meets the sparsity to one unit.
    """
    if not 0 <= epsilon < 1:
        raise InputError(f"alpha: epsilon={epsilon} must be at least 0 and less than 1")

    def allocate(
        model: Model, tokens: np.ndarray, request: Request, runtime: Runtime, layerwise: Layerwise
    ) -> Allocation:
        shapes = all_shapes(model)

        def visit(i: int, block: Block, stats: Any) -> tuple[Block, Any]:
            return block, {
                s.name: exponent(getattr(block, s.name).w, variant == "official")
                for s in model.arch.slots
            }

        alone = dataclasses.replace(runtime, mesh=None)  # a spectrum is of the whole matrix
        key = ("spectra", variant)
        found = calibrate_blocks(
            model,
            tokens,
            alone,
            visit,
            watch={},
            propagate="pruned",
            name="fitting spectra",
            key=key,
        )
        asked = fractions(
            np.array([np.mean(list(block.values())) for block in found]), request.sparsity, epsilon
        )
        sizes = np.array([sum(out * inputs for out, inputs in block.values()) for block in shapes])
        asked = asked * request.sparsity / np.average(asked, weights=sizes)
        if variant == "official":
            budget = by_block(model, np.minimum(asked, 1.0))
        else:
            budget = exact(by_block(model, asked), shapes, request.sparsity)
        means = block_means(budget, shapes)
        exponents = [sum(block.values()) / len(block) for block in found]
        return Allocation(
            budget,
            {"alpha": found, "block_sparsity": means},
            figures=allocation_figures(means, request.sparsity, "exponent", exponents),
        )

    return allocate
