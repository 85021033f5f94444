"""Costs of compiled programs, read from the compiler."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

# An asynchronous collective is a start and a done. Only the start is counted.
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


class Cost(NamedTuple):
    """Cost of one program for one set of shapes.

    Attributes:
      name: Name for people.
      calls: Calls in the whole run.
      flops: Floating-point operations of one call's matrix products, all devices together.
      bytes: Bytes that one call moves on one device, as XLA counts them (loops once).
      memory: Bytes of one device that one call takes, arguments and results included.
      peak: Bytes alive on one device while the program runs, at the worst of its calls.
      collectives: Number of collective operations in the program's text, by kind.
      seconds: Seconds to compile.
      failed: Reason why the program could not be compiled; empty if it could.
    """

    name: str
    calls: int
    flops: float
    bytes: float = 0.0
    memory: int = 0
    peak: int = 0
    collectives: Mapping[str, int] = {}
    seconds: float = 0.0
    failed: str = ""


class Compiled(NamedTuple):
    """A compiled program: its cost, bytes of arguments on one device, and result shapes."""

    cost: Cost
    argument_bytes: int
    result: Any


def dtype_of(x: Any) -> Any:
    """Return the type of an array, or of a Python number as an array."""
    return x.dtype if hasattr(x, "dtype") else np.result_type(x)


def is_out_of_memory(error: Exception) -> bool:
    """Return True if the host's or a device's memory did not suffice.

    Args:
      error: What was raised.
    """
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def placement_key(x: Any) -> str:
    """Return a text that is equal for equal placements of an array."""
    sharding = getattr(x, "sharding", None)
    if sharding is None or sharding.is_fully_replicated:
        return ""
    axes = list(getattr(sharding, "spec", (sharding,)))
    # Trailing axes that are not split may be left out of a spec. Both spellings are one placement.
    while axes and axes[-1] is None:
        axes.pop()
    return str(axes)


def read_cost(compiled: Any, work: float, seconds: float) -> Cost:
    """Read off what a compiled program takes.

    Args:
      compiled: `jax.stages.Compiled`.
      work: Its floating-point operations, as `flops` counts them.
      seconds: Seconds that its compilation took.

    Returns:
      Cost without a name and calls.
    """
    sizes, analysis = compiled.memory_analysis(), compiled.cost_analysis() or {}
    memory = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        # A donated argument and the result in its place are one buffer.
        - sizes.alias_size_in_bytes
    )
    collectives = dict(Counter(COLLECTIVE.findall(compiled.as_text())))
    moved = analysis.get("bytes accessed", 0.0)
    return Cost("", 0, work, moved, memory, 0, collectives, seconds)


def compile_for(
    jitted: Any, static: Sequence[int], args: Sequence[Any], shape: Callable[[Any], Any]
) -> Compiled:
    """Compile a function for the shapes of its arguments and read off its cost.

    Args:
      jitted: `jax.jit` of the function.
      static: Positions of static arguments.
      args: Arguments, real or planned.
      shape: Maps an argument's array to its shape with a placement.

    Returns:
      Cost without a name and calls, bytes of the arguments, and the shapes of the result.
    """
    shapes = [a if k in static else jax.tree.map(shape, a) for k, a in enumerate(args)]
    traced = jitted.trace(*shapes)
    # Counted in the traced program: XLA's own figure takes a loop's body once, however often it
    # runs, and factorisations on a CPU not at all.
    work = flops(traced.jaxpr.jaxpr)
    lowered, begin = traced.lower(), time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        # TPUs' compiler refuses a program that does not fit. The plan says so, and goes on.
        if not is_out_of_memory(e):
            raise
        seconds = time.perf_counter() - begin
        cost = Cost("", 0, work, seconds=seconds, failed="does not fit")
        return Compiled(cost, 0, jax.tree.map(shape, lowered.out_info))
    cost = read_cost(compiled, work, time.perf_counter() - begin)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    result = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    return Compiled(cost, arguments, result)


def _dims(v: Any) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def flops(jaxpr: core.Jaxpr) -> float:
    """Count the floating-point operations of a program's matrix products.

    Args:
      jaxpr: The traced program. Loops of unknown length count once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        shapes = [_dims(v) for v in eqn.invars]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            products = math.prod(_dims(eqn.outvars[0]))
            # Each product is added to a sum.
            total += 2.0 * products * math.prod(shapes[0][i] for i in contracted)
        inner = [flops(j) for j in core.jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":
            # One branch runs. The costlier one makes the plan an upper bound.
            total += max(inner)
        else:
            total += sum(inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total
