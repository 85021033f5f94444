"""A method's whole work in a process of its own, and its arithmetic, for `launch.bench`."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from launch.benchmarks.solvers import Task, model_of

if TYPE_CHECKING:  # imported where a process uses them
    from pruning.types import Method, Request


def parsed(task: Task, argument: str) -> tuple["Method | None", "Request"]:
    """Return the method that an argument names, None for the perplexity, and the request."""
    from launch.flags import calls
    from pruning.methods import ALLOCATIONS, METHODS
    from pruning.types import Request

    method, _, allocation = argument.partition("|")
    spread = None
    if allocation != "uniform":
        spread = calls.build("allocation", allocation, ALLOCATIONS)
    built = calls.build("method", method, METHODS) if method else None
    return built, Request(task.sparsity, allocation=spread)


def _work_of(task: Task, argument: str) -> Callable[[], object]:
    """Return the function that does a row's work with the model in memory."""
    import jax

    from calibration.runtime import Runtime
    from eval.perplexity import perplexity
    from pruning.types import prune

    method, request = parsed(task, argument)
    model = model_of(task)
    if method is None:
        return lambda: perplexity(model, task.tokens, batch=task.batch).value
    runtime = Runtime(task.batch)
    return lambda: jax.block_until_ready(
        prune(model, method, task.tokens, request, runtime)[0].blocks
    )


def time_once(task: Task, argument: str) -> float:
    """Return the seconds of a row's work, the first in its process.

    Args:
      task: The work.
      argument: Method and allocation, separated by a bar.
    """
    run = _work_of(task, argument)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_twice(task: Task, argument: str) -> tuple[float, float]:
    """Return the seconds of a row's work, first and again in one process.

    Args:
      task: The work.
      argument: Method and allocation, separated by a bar.
    """
    run = _work_of(task, argument)
    times = [time.perf_counter()]
    for _ in range(2):
        run()
        times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1]


def count_flops(task: Task, argument: str) -> float:
    """Return the floating-point operations of a row's matrix products, by following it on shapes.

    A search that may end early is counted to its end.

    Args:
      task: The work.
      argument: Method and allocation, separated by a bar.
    """
    import jax

    from calibration.runtime import Runtime
    from models.arch import Model, logits
    from models.checkpoint.blocks import ShapeBlocks
    from models.checkpoint.reader import abstract, read_config
    from models.costs import flops
    from models.families import hf
    from models.programs import ShapeRecorder, record_programs
    from models.sharding import make_mesh
    from pruning.types import prune

    method, request = parsed(task, argument)
    arch, non_block, specs = hf.specs(read_config(task.directory))
    specs = specs[: task.blocks or None]
    shapes = abstract(arch, non_block, specs, jax.numpy.float32)
    if method is None:
        tokens = jax.ShapeDtypeStruct(task.tokens.shape, jax.numpy.int32)
        forward = jax.jit(lambda ends, blocks, x: logits(Model(arch, ends, blocks), x))
        return flops(forward.trace(shapes.non_block, shapes.blocks, tokens).jaxpr.jaxpr)
    model = Model(arch, shapes.non_block, ShapeBlocks(specs, jax.numpy.float32))
    recorder = ShapeRecorder(make_mesh("", 1, jax.local_devices()[:1]))
    with record_programs(recorder):
        prune(model, method, task.tokens, request, Runtime(task.batch))
    return recorder.flops
