"""Run programs in turn, so that a machine whose speed drifts slows all of them."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from launch.benchmarks.solvers import Run

T = TypeVar("T")


def in_turn(programs: Mapping[str, Callable[[], T]], runs: int) -> dict[str, list[T]]:
    """Run every program in turn, A B A B ….

    Args:
      programs: Programs by name.
      runs: Number of runs of each.

    Returns:
      Results of each program's runs by name.
    """
    results: dict[str, list[T]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, program in programs.items():
            results[name].append(program())
    return results


def _seconds_of(program: Callable[[], object]) -> float:
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


def time_in_turn(programs: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Time every program in turn, after one warm-up of each.

    Args:
      programs: Programs by name.
      runs: Number of timed runs of each.

    Returns:
      Seconds of each program's runs by name.
    """
    for program in programs.values():
        program()
    timed = {name: functools.partial(_seconds_of, program) for name, program in programs.items()}
    return in_turn(timed, runs)


def summarise(runs: Mapping[str, list[Run]], tokens: int) -> dict[str, dict[str, Any]]:
    """Return medians, and ratios to the last program.

    Args:
      runs: Runs by name.
      tokens: Number of calibration tokens.

    Returns:
      By name: `seconds` of each run, their `median`, the `ratio` to the last program (median over
      pairs of runs, which ran at about the same time), `tokens_per_second`, `peak_memory_bytes`.
    """
    base = runs[list(runs)[-1]]
    results = {}
    for name, own in runs.items():
        seconds = [r.seconds for r in own]
        pairs = zip(own, base, strict=True)
        results[name] = {
            "seconds": seconds,
            "median": statistics.median(seconds),
            "ratio": statistics.median(a.seconds / b.seconds for a, b in pairs),
            "tokens_per_second": tokens / statistics.median(seconds),
            "peak_memory_bytes": max((r.peak for r in own if r.peak), default=None),
        }
    return results
