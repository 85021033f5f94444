"""Run whole pruning runs in processes of their own, for `launch.bench`."""

import multiprocessing
import pathlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from eval.size import peak_memory
from models.progress import Advance, no_advance

if TYPE_CHECKING:  # imported where a process uses it
    from models.arch import Model

T = TypeVar("T")


class Run(NamedTuple):
    """Cost of one run.

    Attributes:
      seconds: Time from the loaded model to the last pruned block.
      peak: Peak memory in bytes of its process; None if it shared one.
    """

    seconds: float
    peak: int | None


class Task(NamedTuple):
    """Work that the runs of a comparison share.

    Attributes:
      directory: Hugging Face directory of the model.
      tokens: Calibration windows, int [samples time].
      sparsity: Fraction to remove.
      batch: Windows at a time.
      blocks: Number of blocks to prune; 0 for all.
    """

    directory: pathlib.Path
    tokens: np.ndarray
    sparsity: float
    batch: int
    blocks: int


# (task, argument) -> seconds.
Program = Callable[[Task, str], float]


def model_of(task: Task) -> "Model":
    """Return the task's model in memory, with the blocks to prune alone.

    Args:
      task: The work.
    """
    import jax

    from models.checkpoint.reader import in_memory, open_checkpoint
    from models.host_memory import keep_freed_memory

    keep_freed_memory()  # as every command does
    model = in_memory(open_checkpoint(task.directory).model)
    model = model._replace(blocks=model.blocks[: task.blocks or None])
    return jax.block_until_ready(model)


def time_method(task: Task, method: str) -> float:
    """Return the seconds of one of our methods, compilation included.

    Args:
      task: The work.
      method: A call such as `sparsegpt(damp=0.01)`.
    """
    import jax

    from calibration.runtime import Runtime
    from launch.flags import calls
    from pruning.methods import METHODS
    from pruning.types import Request, prune

    model = model_of(task)
    start = time.perf_counter()
    built = calls.build("method", method, METHODS)
    request, runtime = Request(task.sparsity), Runtime(task.batch)
    jax.block_until_ready(prune(model, built, task.tokens, request, runtime)[0].blocks)
    return time.perf_counter() - start


def time_search(task: Task, allocation: str) -> float:
    """Return the seconds that one of our allocators takes for Wanda, compilation included.

    Args:
      task: The work.
      allocation: A call such as `neuroal(samples=8)`.
    """
    from calibration.runtime import Runtime
    from launch.flags import calls
    from pruning.methods import ALLOCATIONS, METHODS
    from pruning.types import Request, prune

    model = model_of(task)
    start, seconds = time.perf_counter(), 0.0

    def stage(description: str, steps: int, **_: Any) -> Advance:
        # Wanda's own stage begins last, when the search has ended.
        nonlocal seconds
        seconds = time.perf_counter() - start
        return no_advance

    request = Request(task.sparsity, allocation=calls.build("allocation", allocation, ALLOCATIONS))
    runtime = Runtime(task.batch, progress=stage)
    prune(model, METHODS["wanda"](), task.tokens, request, runtime)
    return seconds


def _child(function: Callable[[Task, str], Any], task: Task, argument: str, out: Any) -> None:
    result = function(task, argument)
    out.put((result, peak_memory(())["host"]))


def run_in_process(program: Program, task: Task, argument: str = "") -> Run:
    """Run a program in a fresh process, as `call_in_process` does.

    Args:
      program: The program.
      task: Its work.
      argument: Its second argument.

    Returns:
      Seconds and the peak memory of the process.
    """
    return Run(*call_in_process(program, task, argument))


def call_in_process(
    function: Callable[[Task, str], T], task: Task, argument: str
) -> tuple[T, int | None]:
    """Call a function in a fresh process, which shares no memory with others.

    Args:
      function: The function.
      task: Its work.
      argument: Its second argument.

    Returns:
      Its result, and the peak memory of the process in bytes.
    """
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    process = context.Process(target=_child, args=(function, task, argument, out))
    process.start()
    try:
        process.join()
    finally:
        process.terminate()  # if the benchmark itself is interrupted
    if process.exitcode:
        raise RuntimeError(f"a benchmark's process ended with {process.exitcode}")
    return out.get()
