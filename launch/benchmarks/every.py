"""Time every method, first and again, against plain PyTorch, authors' code and the arithmetic."""

import pathlib
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from eval.peak import flops_per_second
from launch.benchmarks import torch_admm, torch_solvers, torch_statistics
from launch.benchmarks.every_programs import count_flops, time_once, time_twice
from launch.benchmarks.solvers import Program, Run, Task, call_in_process, run_in_process
from launch.flags.cli import Flags
from launch.flags.compilation import compilation_cache
from models.errors import InputError
from models.untrusted import user_path


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: Name of the row, and of the folder with the authors' code.
      method: Method to run, as in --method; empty for the perplexity.
      sparsity: Fraction to remove.
      windows: Most calibration windows that it is given.
      pytorch: The same in plain PyTorch; None where there is none.
      allocation: How the sparsity is spread.
      gated: Whether the PyTorch program is for gated feed-forward parts alone.
    """

    name: str
    method: str
    sparsity: float
    windows: int
    pytorch: Program | None
    allocation: str = "uniform"
    gated: bool = False

    @property
    def argument(self) -> str:
        """Return method and allocation, as programs in other processes get them."""
        return f"{self.method}|{self.allocation}"

    def task(self, task: Task) -> Task:
        """Return a task with the sparsity of this row, and at most its windows."""
        windows = task.tokens[: self.windows]
        batch = min(task.batch, len(windows))
        return task._replace(sparsity=self.sparsity, tokens=windows, batch=batch)


STATISTICS = torch_statistics.time_dense_statistics
ROWS = (
    Row("llmrank", 'llmrank(units="rows", variant="official")', 0.3, 12, STATISTICS),
    Row("flap official", 'flap(variant="official")', 0.2, 12, STATISTICS),
    Row("flap", "flap", 0.2, 12, STATISTICS),
    Row("wanda", "wanda", 0.5, 12, torch_statistics.time_wanda),
    Row("sparsegpt", "sparsegpt", 0.5, 12, torch_solvers.time_sparsegpt),
    Row("admm", "admm", 0.5, 12, torch_admm.time_admm, gated=True),
    Row("sleb", "sleb", 0.1, 2, torch_solvers.time_sleb),
    Row("sparsellm", "sparsellm", 0.7, 4, torch_solvers.time_sparsellm, gated=True),
    Row("neuroal", "wanda", 0.7, 8, torch_solvers.time_neuroal_trials, "neuroal(samples=8)"),
    Row("perplexity", "", 0.0, 12, torch_statistics.time_perplexity),
)
NAMES = tuple(row.name.replace(" ", "_") for row in ROWS)


class Times(NamedTuple):
    """Costs of a row, each by run.

    Attributes:
      cold: First in a process, without kept programs.
      second: First in another process, with the programs of the one before.
      warm: Again in that process; the two share its peak memory.
      others: PyTorch's and the authors', by name.
      flops: Floating-point operations of the matrix products of one run.
    """

    cold: list[Run]
    second: list[Run]
    warm: list[Run]
    others: dict[str, list[Run]]
    flops: float


def flags(f: Flags) -> None:
    """Define the flags of this measurement.

    Args:
      f: The command's flags.
    """
    f.group("Every method (--what=all, --what=shares)")
    f.string(
        "rows",
        "",
        f"comma-separated rows of {', '.join(NAMES)}; empty: all",
        names=NAMES,
        several=True,
    )
    f.string(
        "authors",
        "",
        "folder with an executable NAME/run for each row that the authors' own code is there for; "
        "it gets a model directory, a .npy file of tokens and the sparsity, and prints the seconds "
        "of its pruning last",
        files=True,
    )


def chosen(names: str) -> tuple[Row, ...]:
    """Return the rows that a flag names, all for an empty text.

    Args:
      names: Names, separated by commas.

    Raises:
      InputError: There is no such row.
    """
    wanted = [name.strip().replace("_", " ") for name in names.split(",") if name.strip()]
    known = {row.name: row for row in ROWS}
    for name in wanted:
        if name not in known:
            raise InputError(
                "is no row of the table", f"there are {', '.join(NAMES)}", field="rows", value=name
            )
    return tuple(known[name] for name in wanted) or ROWS


def time_row(
    row: Row, task: Task, runs: int, has_torch: bool, authors: pathlib.Path | None
) -> Times:
    """Time a row: all its programs in turn, in processes of their own.

    Args:
      row: The row.
      task: The work, of which the row takes its sparsity and at most its windows.
      runs: Number of runs of each program.
      has_torch: Whether to time PyTorch.
      authors: Folder of the authors' code; None without it.
    """
    task, argument = row.task(task), row.argument
    times = Times([], [], [], {}, count_flops(task, argument))
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder, compilation_cache(folder):
            times.cold.append(run_in_process(time_once, task, argument))
            (first, again), peak = call_in_process(time_twice, task, argument)
        times.second.append(Run(first, peak))
        times.warm.append(Run(again, peak))
        if has_torch and row.pytorch is not None:
            times.others.setdefault("PyTorch", []).append(run_in_process(row.pytorch, task))
        program = authors / row.name.replace(" ", "_") / "run" if authors else None
        if program and program.is_file():
            times.others.setdefault("authors", []).append(_run_authors(program, task))
    return times


def _run_authors(program: pathlib.Path, task: Task) -> Run:
    """Run the authors' code and return the seconds that it prints last."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = pathlib.Path(folder) / "tokens.npy"
        np.save(tokens, task.tokens)
        done = subprocess.run(
            [str(program), str(task.directory), str(tokens), str(task.sparsity)],
            capture_output=True,
            text=True,
            check=False,
        )
    lines = done.stdout.split()
    try:
        return Run(float(lines[-1]), None)
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise InputError(
            f"{program} printed no seconds (exit code {done.returncode}: {last})",
            "let it print the seconds of its pruning last",
            field="authors",
        ) from None


def measure(
    task: Task, values: Mapping[str, Any], has_torch: bool, is_gated: bool
) -> dict[str, Any]:
    """Time the rows that were asked for.

    Args:
      task: Model, windows and micro-batch.
      values: Values of the flags.
      has_torch: Whether to time PyTorch.
      is_gated: Whether the model's feed-forward parts are gated.

    Returns:
      `peak`: operations per second of a large matrix product; `rows`: by name `cold`, `second` and
      `warm` (seconds of each run and peak memory in bytes), the same of "PyTorch" and "authors"
      where they ran, `flops`, `floor` (seconds of these operations at the peak), `over_floor` (warm
      over floor) and `faster` (the others' median seconds over ours, warm); `mean`: the geometric
      mean of `faster` over the rows, by name of the other.
    """
    import jax.numpy as jnp

    authors = user_path(values["authors"], "authors") if values["authors"] else None
    peak, rows = flops_per_second(jnp.float32), {}
    for row in chosen(values["rows"]):
        timed = row if is_gated or not row.gated else row._replace(pytorch=None)
        rows[row.name] = _record(time_row(timed, task, values["runs"], has_torch, authors), peak)
    others = {name for row in rows.values() for name in row["faster"]}
    mean = {
        other: statistics.geometric_mean(
            row["faster"][other] for row in rows.values() if other in row["faster"]
        )
        for other in sorted(others)
    }
    return {"peak": peak, "rows": rows, "mean": mean}


def _record(times: Times, peak: float) -> dict[str, Any]:
    """Return a row as JSON; see `measure`."""
    programs = {"cold": times.cold, "second": times.second, "warm": times.warm, **times.others}
    floor = times.flops / peak
    warm = statistics.median(run.seconds for run in times.warm)
    return {
        **{
            name: {
                "seconds": [run.seconds for run in own],
                "peak_memory_bytes": max((run.peak for run in own if run.peak), default=None),
            }
            for name, own in programs.items()
        },
        "flops": times.flops,
        "floor": floor,
        "over_floor": warm / floor if floor else None,
        "faster": {
            name: statistics.median(run.seconds for run in own) / warm
            for name, own in times.others.items()
        },
    }


def _figure(value: float) -> str:
    """Return a figure with the digits that a narrow column has room for."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def table(title: str, result: Mapping[str, Any]) -> Table:
    """Return the measurements as a table for the terminal.

    Args:
      title: Title of the table.
      result: `measure`'s.
    """
    others = list(result["mean"])
    heads = ["", *others, "cold", "second", "warm", "GiB", "floor", "over\nfloor"]
    heads += [f"faster\nthan\n{name}" for name in others]
    # Plain numbers and no lines between columns, so that it fits a narrow terminal.
    shown = Table(*heads, box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    shown.title = Text(f"{title}: seconds and peak memory")
    for column in shown.columns[1:]:
        column.justify = "right"
    shown.columns[0].no_wrap = True
    for name, row in result["rows"].items():
        seconds = [
            _figure(statistics.median(row[part]["seconds"])) if part in row else "—"
            for part in (*others, "cold", "second", "warm")
        ]
        over = row["over_floor"]
        memory = row["cold"]["peak_memory_bytes"]
        shown.add_row(
            name,
            *seconds,
            _figure(memory / 2**30) if memory else "—",
            _figure(row["floor"]) if row["floor"] else "—",
            f"{over:.2f}" if over else "—",
            *(f"{row['faster'][o]:.2f}x" if o in row["faster"] else "—" for o in others),
        )
    means = (f"{mean:.2f} times as fast as {name}" for name, mean in result["mean"].items())
    notes = [
        "cold: first in a process; second: first in another, with the compiled programs of that;",
        "warm: again in it; floor: the products' operations at the measured peak; over floor: warm",
        "over it.",
        *([f"Geometric mean, warm: {', '.join(means)}."] if others else []),
    ]
    shown.caption, shown.caption_justify = Text(" ".join(notes)), "left"
    return shown
