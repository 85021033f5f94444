"""Where the time of a method goes: its programs, compilation, reading and writing."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.table import Table

from launch.benchmarks.every import Row
from launch.benchmarks.solvers import Task, call_in_process
from launch.report import summary
from launch.run.compilation import counted
from models.programs import Program, Recorder, record_programs

if TYPE_CHECKING:  # imported where a process uses them
    from models.arch import Model

SHOWN = 5  # programs of a method in the table


class TimingRecorder(Recorder):
    """Recorder that waits for every program and adds up its seconds.

    Attributes:
      seconds: Seconds by name of the program.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def call(self, program: Program, name: str, args: Sequence[Any]) -> Any:
        """Run one call of a program, as `Recorder.call` has it."""
        # What the arguments still wait for is another program's time.
        jax.block_until_ready([a for k, a in enumerate(args) if k not in program.static])
        start = time.perf_counter()
        result = jax.block_until_ready(program.jitted(*args))
        spent = time.perf_counter() - start
        self.seconds[program.name] = self.seconds.get(program.name, 0.0) + spent
        return result


def time_parts(task: Task, argument: str) -> dict[str, Any]:
    """Time the parts of a method's work in this process.

    Args:
      task: The work.
      argument: Method and allocation, separated by a bar.

    Returns:
      Seconds: `total` of a second run in the process, `programs` by name in it, `host` of the rest
      of it; `compile` of the first run, `read` of the checkpoint and `write` of the result.
    """
    from calibration.runtime import Runtime
    from launch.benchmarks.every_programs import parsed
    from models.checkpoint.reader import in_memory, open_checkpoint
    from models.checkpoint.writer import save
    from models.host_memory import keep_freed_memory
    from pruning.types import prune

    keep_freed_memory()  # as every command does
    method, request = parsed(task, argument)
    assert method is not None
    checkpoint = open_checkpoint(task.directory)
    start = time.perf_counter()
    model = jax.block_until_ready(in_memory(checkpoint.model))
    read = time.perf_counter() - start
    model = model._replace(blocks=model.blocks[: task.blocks or None])

    def run() -> "Model":
        pruned = prune(model, method, task.tokens, request, Runtime(task.batch))[0]
        jax.block_until_ready(pruned.blocks)
        return pruned

    with counted() as compilation:
        run()
    recorder = TimingRecorder()
    start = time.perf_counter()
    with record_programs(recorder):
        pruned = run()
    total = time.perf_counter() - start
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "pruned", pruned, checkpoint.config, checkpoint.directory)
    return {
        "total": total,
        "programs": recorder.seconds,
        "host": total - sum(recorder.seconds.values()),
        "compile": compilation.seconds,
        "read": read,
        "write": time.perf_counter() - start,
    }


def measure(rows: Sequence[Row], task: Task) -> dict[str, Any]:
    """Time the parts of the work of every row that prunes, each in a process of its own.

    Args:
      rows: Rows of `launch.benchmarks.every`.
      task: Model, windows and micro-batch.

    Returns:
      What `time_parts` returns, by name of the row.
    """
    return {
        row.name: call_in_process(time_parts, row.task(task), row.argument)[0]
        for row in rows
        if row.method
    }


def table(title: str, results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the measurements as a table for the terminal.

    Args:
      title: Title of the table.
      results: `measure`'s.
    """
    shown = Table("", "warm", "of it", "compile", "read", "write", title=title)
    for name, parts in results.items():
        total = parts["total"]
        largest = sorted(parts["programs"].items(), key=lambda item: -item[1])
        shares = [f"{program} {s / total:.0%}" for program, s in largest[:SHOWN]]
        others = sum(s for _, s in largest[SHOWN:])
        shares += [f"other programs {others / total:.0%}"] if others else []
        shares.append(f"host {parts['host'] / total:.0%}")
        rest = (summary.duration(parts[key]) for key in ("compile", "read", "write"))
        shown.add_row(name, summary.duration(total), ", ".join(shares), *rest)
    return shown
