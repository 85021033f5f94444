"""Run programs in processes of their own, in turn.

Each process has its own peak memory. They take turns, so that a machine whose speed drifts slows
all of them.
"""

import multiprocessing
import os
from collections.abc import Mapping
from typing import Any

from eval.size import peak_memory
from launch.benchmarks.speed_programs import Facts, Program, Task, Times
from models.errors import InputError


def _work(program: Program, task: Task, pipe: Any) -> None:
    """Load and warm up, send the facts, run once for every True, then send the peak memory."""
    # Several processes share a device, so none may take all of its memory beforehand.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        once, facts = program(task)
        once()
    except InputError as e:
        pipe.send(e)
        return
    pipe.send(facts)
    while pipe.recv():
        pipe.send(once())
    import jax

    pipe.send(peak_memory(jax.local_devices()))


class Worker:
    """A program in its own process, which begins to load at once.

    Args:
      program: The program.
      task: Its work.
    """

    def __init__(self, program: Program, task: Task):
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_work, args=(program, task, child_pipe), daemon=True)
        self._process.start()
        child_pipe.close()

    def _receive(self) -> Any:
        try:
            message = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"a benchmark's process ended with {code}") from None
        if isinstance(message, InputError):
            raise message
        return message

    def facts(self) -> Facts:
        """Wait until the program is loaded, compiled and warm, and return its facts."""
        return self._receive()

    def once(self) -> Times:
        """Run the program once and return its seconds."""
        self._pipe.send(True)
        return self._receive()

    def close(self) -> dict[str, int | None]:
        """End the process and return its peak memory in bytes, by "host" and "device"."""
        self._pipe.send(False)
        peak = self._receive()
        self._process.join()
        return peak

    def stop(self) -> None:
        """Terminate the process if it is still running."""
        self._process.terminate()
        self._process.join()


def measure(programs: Mapping[str, tuple[Program, Task]], runs: int) -> dict[str, Facts]:
    """Load the programs one after the other, then run them in turn.

    Args:
      programs: Programs and their work by name.
      runs: Number of runs of each.

    Returns:
      By name: the program's facts, "times" (one Times per run) and "peak_memory_bytes".
    """
    workers: dict[str, Worker] = {}
    results: dict[str, Facts] = {}
    try:
        for name, (program, task) in programs.items():
            workers[name] = Worker(program, task)
            results[name] = workers[name].facts() | {"times": []}
        for _ in range(runs):
            for name, worker in workers.items():
                results[name]["times"].append(worker.once())
        for name, worker in workers.items():
            results[name]["peak_memory_bytes"] = worker.close()
        return results
    finally:
        for worker in workers.values():
            worker.stop()
