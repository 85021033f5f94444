"""Time the programs of one block against the device's peaks, and measure their memory."""

import contextlib
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from eval.peak import bytes_per_second, flops_per_second
from launch.benchmarks.device_programs import (
    HIGHEST,
    SHAPES,
    Inputs,
    Shape,
    Work,
    of_types,
    solvers,
)
from launch.benchmarks.speed_programs import compiled
from launch.benchmarks.timing import in_turn, time_in_turn
from models.arch import linear_of
from models.costs import is_out_of_memory
from models.precision import matmul_type
from models.progress import Progress

TYPES = ("float32", "bfloat16")
PROMPT, NEW_TOKENS = 64, 64
ACCELERATOR_SHAPES, CPU_SHAPES = "1b,7b", "160m"
Row = dict[str, Any]


def peaks() -> dict[str, float]:
    """Measure the device's peaks.

    Returns:
      FLOPs per second of a matrix product by type: float32 as JAX multiplies it by default,
      float32 throughout, and bfloat16; bytes per second of the memory under "memory".
    """
    found = {dtype: flops_per_second(jnp.dtype(dtype)) for dtype in TYPES}
    with matmul_type("float32"):
        found[HIGHEST] = flops_per_second(jnp.dtype("float32"))
    return found | {"memory": bytes_per_second()}


def memory_of(work: Work, device: jax.Device) -> dict[str, int | None]:
    """Run a program once and compare its memory with the plan's.

    Args:
      work: The program, whose arguments are on the device.
      device: The device.

    Returns:
      Bytes beside the arguments: `planned`, as `launch.plan` has them; `measured`, None where the
      device reports no memory, or where an earlier program of this process took more.
    """
    before = device.memory_stats() or {}
    work.run()
    after = device.memory_stats() or {}
    measured = None
    # The peak of the process cannot be set back, so only a new one tells about this program.
    if after.get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0):
        measured = after["peak_bytes_in_use"] - before["bytes_in_use"]
    return {"planned": work.memory, "measured": measured}


def time_work(work: Work, runs: int, peak: Mapping[str, float], memory: Mapping[str, Any]) -> Row:
    """Time a program.

    Args:
      work: The program.
      runs: Timed runs, after a warm-up.
      peak: Output of `peaks`.
      memory: Output of `memory_of`.

    Returns:
      `name`, `peak` (its name), `seconds` of each run and their `median`, `flops` and their rate
      `flops_per_second`, its `share_of_peak`, `bytes` and `bytes_per_second`, and `memory`.
    """
    seconds = time_in_turn({work.name: work.run}, runs)[work.name]
    median = statistics.median(seconds)
    return {
        "name": work.name,
        "peak": work.peak,
        "seconds": seconds,
        "median": median,
        "flops": work.flops,
        "flops_per_second": work.flops / median,
        "share_of_peak": work.flops / median / peak[work.peak],
        "bytes": work.moved,
        "bytes_per_second": work.moved / median if work.moved else None,
        "memory": dict(memory),
    }


def time_generation(inputs: Inputs, dtype: str, runs: int, memory: float) -> Row:
    """Time generation by one block and the head, one text at a time.

    Args:
      inputs: Weights.
      dtype: Name of their type.
      runs: Timed runs, after a warm-up.
      memory: Bytes per second of the memory.

    Returns:
      `name`, `seconds` of each run for the tokens after the first and their `median`,
      `tokens_per_second`, `bytes` that one token must read at least, `bytes_per_second` and its
      `share_of_peak`.
    """
    model = inputs.model
    once, _ = compiled(model, 1, PROMPT, NEW_TOKENS)
    once()
    seconds = [t.generation for t in in_turn({"": once}, runs)[""]]
    # Every weight but the embedding's, of which a token reads a row, and all keys and values.
    weights = sum(x.nbytes for x in jax.tree.leaves((model.blocks, model.non_block)))
    weights -= model.non_block.embed.nbytes
    positions = PROMPT + NEW_TOKENS
    cache = positions * sum(len(linear_of(inputs.block, name).w) for name in ("k", "v"))
    read = weights + cache * jnp.dtype(dtype).itemsize
    median = statistics.median(seconds)
    rate = (NEW_TOKENS - 1) / median
    return {
        "name": f"generation, {dtype}",
        "seconds": seconds,
        "median": median,
        "tokens_per_second": rate,
        "bytes": read,
        "bytes_per_second": read * rate,
        "share_of_peak": read * rate / memory,
    }


@contextlib.contextmanager
def noting_what_does_not_fit(what: str, notes: list[str]) -> Iterator[None]:
    """Note that some work does not fit into the device's memory, and go on without it.

    Args:
      what: The work.
      notes: Takes the note.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if not is_out_of_memory(e):
            raise
        notes.append(f"{what} does not fit into the device's memory")


def time_shape(shape: Shape, runs: int, peak: Mapping[str, float], progress: Progress) -> Row:
    """Time all programs of one shape.

    Args:
      shape: Shape of the model and its windows.
      runs: Timed runs of each program.
      peak: Output of `peaks`.
      progress: Shows the progress.

    Returns:
      `batch`, `length`, `programs` and `generation` as `time_work` and `time_generation` give
      them, and `notes`.
    """
    device = jax.local_devices()[0]
    programs: list[Row] = []
    generation: list[Row] = []
    notes: list[str] = []
    for dtype in TYPES:
        inputs = Inputs(shape, dtype)
        works: list[Work] = []
        with noting_what_does_not_fit(f"a program of {dtype}, with those after it,", notes):
            works.extend(of_types(dtype, inputs))
            if dtype == "float32":
                works.extend(solvers(inputs))
        memory = {}
        # The smallest first, so that each that takes more than all before shows as a new peak.
        for work in sorted(works, key=lambda work: work.memory or 0):
            with noting_what_does_not_fit(work.name, notes):
                memory[work.name] = memory_of(work, device)
        advance = progress(f"timing {dtype}", len(memory) + 1)
        for work in (work for work in works if work.name in memory):
            programs.append(time_work(work, runs, peak, memory[work.name]))
            advance()
        with noting_what_does_not_fit("generation", notes):
            generation.append(time_generation(inputs, dtype, runs, peak["memory"]))
        advance()
    config = {"batch": shape.batch, "length": shape.length}
    return {**config, "programs": programs, "generation": generation, "notes": notes}


def run_speed(
    names: Iterable[str], runs: int, progress: Progress
) -> tuple[dict[str, float], dict[str, Row]]:
    """Measure the peaks, and time the programs of some shapes.

    Args:
      names: Names of the shapes.
      runs: Timed runs of each program.
      progress: Shows the progress.

    Returns:
      Output of `peaks`, and of `time_shape` by name.
    """
    peak = peaks()
    return peak, {name: time_shape(SHAPES[name], runs, peak, progress) for name in names}
