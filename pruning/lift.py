"""From a layer-wise pruner to a method over a whole model: every slot of every block, in one walk."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calibration.fold import fold_blocks
from models.arch import Arch, Block, Model
from pruning.allocate import uniform
from pruning.patterns import n_of_m
from pruning.types import Mask, Method, Outcome, Pattern, Pruner, Put, Request


@functools.cache
def scored(score: Callable[[jax.Array, Any], jax.Array], keep: Callable[[jax.Array, jax.Array], Mask]) -> Callable:
    """The solver that zeroes what `keep` drops by `score` and leaves the rest as it is."""

    def solve(w: jax.Array, stats: Any, count: jax.Array) -> tuple[jax.Array, Mask]:
        kept = keep(score(w, stats), count)
        return jnp.where(kept, w, jnp.zeros_like(w)), kept

    return solve


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve_block(arch: Arch, solve: Callable, block: Block, stats: Mapping[str, Any], counts: Mapping[str, jax.Array]) -> Block:
    linears = {slot.name: getattr(block, slot.name) for slot in arch.slots}
    solved = {s.name: solve(linears[s.name].w, stats.get(s.reads), counts[s.name])[0] for s in arch.slots}
    return block.replace(**{name: linears[name].replace(w=w) for name, w in solved.items()})


def per_linear(pruner: Callable[[Pattern], Pruner], unstructured: Pattern) -> Method:
    """The method that prunes each linear on its own, block after block, each block seeing what the pruned ones before it give.

    Args:
      pruner: the pruner for a pattern; made from module-level functions, so that equal ones compile once.
      unstructured: the pattern for runs without n:m.
    """

    def method(model: Model, tokens: np.ndarray, request: Request, put: Put) -> Outcome:
        arch = model.arch
        pattern = n_of_m(*request.pattern) if request.pattern else unstructured
        budget = (request.allocation or uniform)(model, request.sparsity)
        own = pruner(pattern)

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> Block:
            if not any(np.any(fraction) for fraction in budget[i].values()):
                new = block  # nothing asked of this block: its parameters stay bit for bit
            else:
                counts = {s.name: pattern.counts(getattr(block, s.name).w.shape, budget[i][s.name]) for s in arch.slots}
                new = _solve_block(arch, own.solve, block, stats, counts)
            put(i, new)
            return new

        watch = {} if own.observer is None else {s.reads: own.observer for s in arch.slots}
        # Without statistics the walk needs no activations either.
        calibration = tokens if own.observer else tokens[:0]
        fold_blocks(
            model,
            calibration,
            visit,
            watch=watch,
            propagate="pruned",
            batch=request.batch,
            mesh=request.mesh,
            advance=request.advance,
        )
        return Outcome(asked=tuple({name: float(np.mean(f)) for name, f in b.items()} for b in budget))

    return method
