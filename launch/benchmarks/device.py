"""Show that results are right, and programs fast, on what JAX finds: `--what=device`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from launch.benchmarks import device_speed
from launch.benchmarks.device_checks import BATCH, LENGTH, SAMPLES, Check, run_checks
from launch.benchmarks.device_programs import SHAPES
from launch.flags import calls
from launch.flags.cli import Flags
from launch.report import console, summary
from launch.report.progress import progress
from launch.run.measure import protocol, write_report
from models.errors import InputError
from pruning.methods import METHODS

DIFFERS = 1  # exit code where a result differs from the CPU's
ALL, NONE = "all", "none"


def flags(f: Flags) -> None:
    """Define the flags of this measurement.

    Args:
      f: Flags of `launch.bench`.
    """
    f.group("Device (--what=device)")
    f.string(
        "device_methods",
        ALL,
        "comma-separated methods whose results are compared with the CPU's, all, or none",
        names=(ALL, NONE, *METHODS),
        several=True,
    )
    f.string(
        "device_shapes",
        "",
        f"comma-separated shapes to time one block of, of {', '.join(SHAPES)}, or none; empty: "
        f"{device_speed.ACCELERATOR_SHAPES} on a GPU or a TPU, {device_speed.CPU_SHAPES} on a CPU",
        names=(NONE, *SHAPES),
        several=True,
    )


def chosen(field: str, text: str, allowed: Sequence[str]) -> list[str]:
    """Return the names in a list of names.

    Args:
      field: Name of the setting, for errors.
      text: The list; "none" for no name.
      allowed: All names.

    Raises:
      InputError: A name is not allowed.
    """
    names = [] if text == NONE else calls.split_list(text)
    for name in names:
        if name not in allowed:
            raise InputError(
                "is not known", f"choose of {', '.join(allowed)}, or none", field=field, value=name
            )
    return list(names)


def check_table(checks: Sequence[Check]) -> Table:
    """Return the comparisons as a table.

    Args:
      checks: What they found.
    """
    table = Table(title="results against the CPU's", title_justify="left")
    for heading in ("", "model", "masks", "weights", "perplexity", "rounding", "result"):
        table.add_column(heading, overflow="fold")
    for c in checks:
        name = c.name if c.types == "float32" else f"{c.name}, {c.types}"
        values = [f"{100 * c.distance.masks:.2g}%", *(f"{d:.1g}" for d in c.distance[1:])]
        rounding = "" if c.rounding is None else f"{100 * c.rounding.masks:.2g}%"
        model = c.model.rpartition(":")[2]
        table.add_row(name, model, *values, rounding, "same" if c.passed else "differs")
    return table


def speed_table(title: str, programs: Sequence[Mapping[str, Any]]) -> Table:
    """Return the times of one shape's programs as a table.

    Args:
      title: Title of the table.
      programs: Rows of `device_speed.time_work`.
    """
    heads = ("", "products in", "median", "TFLOP/s", "of peak", "moved")
    table = Table(*heads, title=title, title_justify="left")
    for r in programs:
        table.add_row(
            r["name"],
            r["peak"],
            _time(r["median"]),
            f"{r['flops_per_second'] / 1e12:.3g}",
            summary.percent(r["share_of_peak"]),
            summary.size(r["bytes"] and int(r["bytes"])),
        )
    return table


def memory_table(programs: Sequence[Mapping[str, Any]]) -> Table:
    """Return the memory of programs, as planned and as measured, as a table.

    Args:
      programs: Rows of `device_speed.time_work`.
    """
    table = Table("memory beside the arguments", "planned", "measured", "of the plan")
    for r in programs:
        planned, measured = (r["memory"][key] for key in ("planned", "measured"))
        share = measured / planned if measured and planned else None
        name = f"{r['name']}, {r['peak']}"
        table.add_row(name, summary.size(planned), summary.size(measured), summary.percent(share))
    return table


def generation_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the times of generation as a table.

    Args:
      rows: Rows of `device_speed.time_generation`.
    """
    heads = ("one block and the head", "a token", "tokens/s", "read", "GB/s", "of peak")
    table = Table(*heads)
    for r in rows:
        table.add_row(
            r["name"],
            _time(1 / r["tokens_per_second"]),
            f"{r['tokens_per_second']:,.0f}",
            summary.size(r["bytes"]),
            f"{r['bytes_per_second'] / 1e9:.3g}",
            summary.percent(r["share_of_peak"]),
        )
    return table


def _time(seconds: float) -> str:
    """Format a short time."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def _show_checks(checks: Sequence[Check], out: Console) -> None:
    """Print the comparisons, and how to read them."""
    out.print(check_table(checks))
    out.print(
        "masks: share of entries that one of the two removes alone; weights: largest difference of "
        "an entry in rows of equal masks, of its matrix's largest; rounding: share of entries that "
        "change on the CPU alone when every embedding is off by one rounding: near ties",
        soft_wrap=True,
    )
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        console.note("this device is the CPU: results are compared with themselves")
    if len(jax.local_devices()) == 1:
        console.note("one device: nothing is split over several")


def _show_speed(peak: Mapping[str, float], shapes: Mapping[str, Any], out: Console) -> None:
    """Print the peaks, and the times and the memory of all shapes."""
    reported = bool(jax.local_devices()[0].memory_stats())
    rates = [f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in peak.items() if name != "memory"]
    out.print(f"peaks: {'; '.join(rates)}; memory {peak['memory'] / 1e9:.3g} GB/s", soft_wrap=True)
    for name, shape in shapes.items():
        title = f"one block of {name}, {shape['batch']} x {shape['length']} tokens"
        rows = shape["programs"]
        out.print(speed_table(title, rows), generation_table(shape["generation"]))
        if reported:
            out.print(memory_table(rows))
        for note in shape["notes"]:
            console.note(f"warning: {name}: {note}")
        if any(r["share_of_peak"] > 1 for r in [*rows, *shape["generation"]]):
            console.note(
                f"{name}: a share above 100 % is of work that stays in the caches, or the machine "
                "was slower when the peak was measured"
            )
    if not reported:
        console.note("this device does not report its memory: there is nothing to hold the plan to")


def run(values: Mapping[str, Any]) -> int:
    """Check and time, print tables, and write the results to --json.

    Args:
      values: Values of the flags.

    Returns:
      Exit code: DIFFERS where a result is not the CPU's.
    """
    device, methods = jax.local_devices()[0], values["device_methods"]
    default = device_speed.ACCELERATOR_SHAPES
    if device.platform == "cpu":
        default = device_speed.CPU_SHAPES
    shapes = chosen("device_shapes", values["device_shapes"] or default, list(SHAPES))
    known = list(METHODS)
    names = known if methods == ALL else chosen("device_methods", methods, known)
    out, checks = Console(), []
    peak: Mapping[str, float] = {}
    timed: Mapping[str, Any] = {}
    console.note(f"{len(jax.local_devices())} x {device.device_kind}")
    if names:
        with progress() as shown:
            checks = run_checks(names, shown)
        _show_checks(checks, out)
    if shapes:
        with progress() as shown:
            peak, timed = device_speed.run_speed(shapes, values["runs"], shown)
        _show_speed(peak, timed, out)
    wrong = [c for c in checks if not c.passed]
    if names:
        console.note(f"{len(checks) - len(wrong)} of {len(checks)} results are the CPU's")
    if values["json"]:
        report = {
            "what": "device",
            "windows": {"samples": SAMPLES, "length": LENGTH, "batch": BATCH},
            "checks": [_record(c) for c in checks],
            "peaks": peak,
            "speed": timed,
            "protocol": protocol({}),
        }
        write_report(values["json"], report)
    return DIFFERS if wrong else 0


def _record(check: Check) -> dict[str, Any]:
    """Return a comparison as JSON has it."""
    rounding = check.rounding._asdict() if check.rounding else None
    return {**check._asdict(), "distance": check.distance._asdict(), "rounding": rounding}
