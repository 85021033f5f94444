"""SparseGPT (Frantar & Alistarh 2023) as a layer-wise rule; the maths is in `sparsegpt_core`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from calibration.observers import Gram, gram
from models.errors import InputError
from pruning.types import Pattern, Pruner
from pruning.weights.patterns import per_column_block
from pruning.weights.per_linear import PerLinear
from pruning.weights.sparsegpt_core import COLUMNS, Factor, factor, hessian, solve

DAMP = 0.01  # as the authors' code


# Cached: a function made anew would be another program for every tap.
@functools.cache
def _prepare_with(damp: float) -> Callable[[Gram], tuple[Factor, dict[str, jax.Array]]]:
    """Return the function that factors H at this damping."""

    def prepare(stats: Gram) -> tuple[Factor, dict[str, jax.Array]]:
        factored = factor(hessian(stats), damp)
        return factored, {"damping": factored.damping}

    return prepare


@functools.cache
def pruner(damp: float, pattern: Pattern) -> Pruner:
    """Return SparseGPT as a layer-wise rule; equal arguments give one object, so one compilation.

    Args:
      damp: Share of H's mean diagonal that is added to the diagonal.
      pattern: Chooses the entries to remove.
    """
    solver = functools.partial(solve, keep=pattern.keep, group=pattern.group)
    return Pruner(gram, solver, _prepare_with(damp))


def damping_warnings(damp: float, details: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every input whose H needed more damping than `damp`.

    Args:
      damp: Damping asked for.
      details: Figures of the outcome; "damping" has tap -> damping used, by block.
    """
    return [
        f"block {i}, {tap}: damping raised from {damp:g} to {used:g}, H did not factor"
        for i, taps in enumerate(details.get("damping", ()))
        for tap, used in taps.items()
        # Figures come as float32 rounded to six digits, so equal dampings may differ in the last.
        if used > damp * 1.001
    ]


def sparsegpt(damp: float = DAMP) -> PerLinear:
    """SparseGPT (Frantar & Alistarh 2023): remove weights by their effect on the output.

    The weights that stay in a row make up for each removed one.

    Args:
      damp: Share of H's mean diagonal added to its diagonal. It is raised, and the report says so,
        where H does not factor.
    """
    if not damp >= 0:  # so that NaN is refused too
        raise InputError(f"sparsegpt: damp={damp} must not be negative")
    return PerLinear(
        functools.partial(pruner, damp),
        per_column_block(COLUMNS),
        functools.partial(damping_warnings, damp),
    )
