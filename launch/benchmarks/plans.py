"""Plan LLaMA-2 on TPUs that are not there: what each method takes, and how long it compiles."""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from launch.flags import calls
from launch.flags.cli import Flags
from launch.report import summary
from launch.run.measure import protocol, write_report
from models.errors import InputError

# Collectives by the names that XLA gives them.
COLLECTIVES = {
    "all-gather": "gathers",
    "all-reduce": "reduces",
    "reduce-scatter": "scatters",
    "all-to-all": "all-to-alls",
    "collective-permute": "permutes",
}
METHODS = ("wanda", "sparsegpt", "sparsellm", "flap")


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      model: Published model, as --model of `launch.plan` has it.
      chips: Topology of TPUs, as --topology has it.
      mesh: Mesh over them.
      batch: Windows in one micro-batch; `data` of the mesh divides it.
      method: Method.
    """

    model: str
    chips: str
    mesh: str
    batch: int
    method: str

    @property
    def name(self) -> str:
        """Return the name of the row."""
        return f"{self.model}_{self.chips}_{self.method}"


ROWS = {
    row.name: row
    for model, chips, mesh, batch in (
        ("llama-2-7b", "v5e:4x4", "data=4,model=4", 8),
        ("llama-2-7b", "v5e:16x16", "data=16,model=16", 16),
        ("llama-2-70b", "v5e:4x4", "data=1,model=16", 8),
        ("llama-2-70b", "v5e:16x16", "data=16,model=16", 16),
    )
    for method in METHODS
    for row in (Row(model, chips, mesh, batch, method),)
}


def flags(f: Flags) -> None:
    """Define the flags of this measurement.

    Args:
      f: Flags of `launch.bench`.
    """
    f.group("Plans (--what=plans)")
    f.string(
        "plans",
        "",
        f"comma-separated rows such as {next(iter(ROWS))}; empty: all {len(ROWS)}, an hour or more",
        names=tuple(ROWS),
        several=True,
    )


def plan_of(row: Row) -> dict[str, Any]:
    """Return the plan of a row as JSON, made by `launch.plan` in a process of its own.

    Args:
      row: The row: 128 windows of 2048 tokens in bfloat16, sparsity 0.5.

    Raises:
      InputError: There is no plan; the message has the last line that `launch.plan` printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "plan.json"
        command = [
            *(sys.executable, "-m", "launch.plan"),
            *(f"--model={row.model}", f"--method={row.method}", "--sparsity=0.5"),
            *("--calibration_length=2048", f"--calibration_batch={row.batch}", "--dtype=bfloat16"),
            *(f"--topology={row.chips}", f"--mesh={row.mesh}", f"--json={file}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise InputError(f"no plan (exit code {done.returncode}: {last})", field=row.name)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def measure(names: str) -> dict[str, Any]:
    """Return the plans of the rows that were asked for, by name.

    Args:
      names: Names, separated by commas; empty for all.

    Raises:
      InputError: There is no such row, or no plan of it.
    """
    wanted = [name for name in calls.split_list(names) if name]
    for name in wanted:
        if name not in ROWS:
            there = f"there are {', '.join(ROWS)}"
            raise InputError("is no row of the table", there, field="plans", value=name)
    return {name: plan_of(ROWS[name]) for name in wanted or ROWS}


def table(plans: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the plans as a table for the terminal.

    Args:
      plans: `measure`'s.
    """
    heads = ("", "memory", "most of it", "PFLOP", "moved", "collectives", "compiled")
    shown = Table(*heads, title="Each TPU, and all programs", title_justify="left")
    for name, plan in plans.items():
        memory, programs = plan["memory"]["device"]["peak"], plan["programs"]
        total = plan["total"]
        shown.add_row(
            name.replace("_", " "),
            summary.size(memory) + ("" if plan["fits"] else ", does not fit"),
            max(programs, key=lambda p: p["peak"])["name"],
            f"{total['flops'] / 1e15:.1f}",
            summary.size(total["bytes_moved"]),
            _collectives(programs),
            f"{total['compile_seconds']:.0f} s",
        )
    return shown


def run(values: Mapping[str, Any]) -> None:
    """Plan, print a table, and write the plans to --json.

    Args:
      values: Values of the flags.
    """
    plans = measure(values["plans"])
    Console().print(table(plans))
    if values["json"]:
        report = {"what": values["what"], "figures": plans, "protocol": protocol({})}
        write_report(values["json"], report)


def _collectives(programs: Sequence[Mapping[str, Any]]) -> str:
    """Return the numbers of collectives in the text of all programs."""
    total: Counter[str] = Counter()
    for p in programs:
        total.update(p["collectives"])
    return ", ".join(f"{total[kind]} {name}" for kind, name in COLLECTIVES.items() if total[kind])
