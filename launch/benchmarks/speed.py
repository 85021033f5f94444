"""Measure prompt latency and generation throughput: `launch.bench --what=speed`.

Dense and pruned models are compared as in SLEB (Song et al. 2024).
"""

import importlib.util
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.benchmarks.speed_programs import Facts, Program, Task, matmul_peak, pytorch, topiary
from launch.benchmarks.speed_workers import measure
from launch.flags.cli import Flags
from launch.report import console, speed_plot, summary
from launch.report.files import read_report, write_reports
from launch.run.measure import model_origin, protocol, write_report
from models.checkpoint import hub
from models.checkpoint.hub_client import source_of
from models.checkpoint.reader import read_config
from models.errors import InputError

TORCH = "PyTorch, dense"


def flags(f: Flags) -> None:
    """Define the flags of this measurement.

    Args:
      f: Flags of `launch.bench`.
    """
    f.group("Speed (--what=speed)")
    f.string(
        "pruned",
        "",
        "comma-separated checkpoints to compare with --model, the dense one",
        several=True,
    )
    f.integer("prompt_length", 2048, "tokens of a prompt, cut to the models' positions", 1)
    f.integer("new_tokens", 128, "tokens generated after each prompt", 2)
    f.string("batch_sizes", "1", "comma-separated numbers of prompts at a time")
    f.string("plot", None, "file to draw the results to: .svg or .png")
    f.boolean("report", False, "add the speed to the reports in the directories of --pruned")


def summarise(results: Mapping[str, Facts], task: Task, peak: float) -> dict[str, Facts]:
    """Return what is reported of each program.

    Args:
      results: Output of `measure`, the dense model first.
      task: The work.
      peak: FLOPs per second of the device.

    Returns:
      By name: the program's facts, `generated` tokens, `seconds` of each run and their `median`,
      `tokens_per_second`, `speedup` over the first program (median over pairs of runs), and
      `share_of_peak` where the FLOPs are known. All but the first by "prompt" and "generation".
    """
    base = next(iter(results.values()))["times"]
    tokens = {"prompt": task.batch * task.prompt, "generation": task.batch * (task.new_tokens - 1)}
    rows = {}
    for name, result in results.items():
        seconds = {part: [getattr(t, part) for t in result["times"]] for part in tokens}
        median = {part: statistics.median(s) for part, s in seconds.items()}
        speedup = {}
        for part in tokens:
            pairs = zip(base, seconds[part], strict=True)
            speedup[part] = statistics.median(getattr(b, part) / s for b, s in pairs)
        row = {key: value for key, value in result.items() if key != "times"}
        row["generated"] = tokens["generation"]
        row["seconds"] = seconds
        row["median"] = median
        row["tokens_per_second"] = {part: n / median[part] for part, n in tokens.items()}
        row["speedup"] = speedup
        flops = result.get("flops", {})
        if flops.get("prompt") and flops["token"]:
            work = {"prompt": flops["prompt"], "generation": flops["token"] * (task.new_tokens - 1)}
            row["share_of_peak"] = {part: n / median[part] / peak for part, n in work.items()}
        rows[name] = row
    return rows


def tables(batch: str, rows: Mapping[str, Facts]) -> list[Table]:
    """Return two tables of one batch size: latency and throughput, then the work behind them.

    Args:
      batch: The batch size.
      rows: Output of `summarise`.
    """
    speed_title, work_title = f"batch {batch}: median (min-max)", f"batch {batch}: work"
    heads = ("", "prompt, s", "speed-up", "tokens/s", "speed-up")
    speed = Table(*heads, title=speed_title, title_justify="left")
    heads = ("", "memory", "GFLOP, prompt", "of peak", "MB per token")
    work = Table(*heads, title=work_title, title_justify="left")
    labels = summary.short_names(rows)
    for name, row in rows.items():
        label = Text(summary.shorten(labels[name]))
        seconds = row["seconds"]["prompt"]
        rates = sorted(row["generated"] / s for s in row["seconds"]["generation"])
        rate = row["tokens_per_second"]["generation"]
        speed.add_row(
            label,
            f"{row['median']['prompt']:.3g} ({min(seconds):.3g}-{max(seconds):.3g})",
            f"{row['speedup']['prompt']:.2f}x",
            f"{rate:.3g} ({rates[0]:.3g}-{rates[-1]:.3g})",
            f"{row['speedup']['generation']:.2f}x",
        )
        flops, moved = row.get("flops", {}).get("prompt"), row.get("bytes", {}).get("token")
        memory = row["peak_memory_bytes"]
        work.add_row(
            label,
            summary.size(memory["device"] or memory["host"]),
            f"{flops / 1e9:.4g}" if flops else summary.ABSENT,
            summary.percent(row.get("share_of_peak", {}).get("prompt")),
            f"{moved / 1e6:.4g}" if moved else summary.ABSENT,
        )
    return [speed, work]


def doubtful(results: Mapping[str, Mapping[str, Facts]]) -> list[str]:
    """Return a warning for every program that was faster than the measured peak of the device.

    Args:
      results: Output of `summarise` by batch size.
    """
    return [
        f"{name}, batch {batch}, {part}: {summary.percent(share)} of the measured peak cannot be: "
        "the machine was slower when the peak was measured; do not trust this share, run again"
        for batch, rows in results.items()
        for name, row in rows.items()
        for part, share in row.get("share_of_peak", {}).items()
        if share > 1
    ]


def prompt_length(prompt: int, new_tokens: int, configs: Sequence[Mapping[str, Any]]) -> int:
    """Cut the prompt so that every model has positions for the new tokens.

    Args:
      prompt: Tokens of a prompt as requested.
      new_tokens: Tokens to generate.
      configs: Each model's config.json.

    Raises:
      InputError: No position is left for a prompt.
    """
    positions = [int(c.get("max_position_embeddings", prompt + new_tokens)) for c in configs]
    room = min(positions) - new_tokens
    if room < 1:
        raise InputError(
            "leaves no position for a prompt", "give fewer", field="new_tokens", value=new_tokens
        )
    return min(prompt, room)


def batch_sizes(text: str) -> list[int]:
    """Parse a comma-separated list of batch sizes.

    Args:
      text: Value of --batch_sizes.

    Raises:
      InputError: An item is not a positive integer.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        reason = "must be positive integers, separated by commas"
        raise InputError(reason, "such as 1,8", field="batch_sizes", value=text)
    return [int(part) for part in parts]


def checkpoints(values: Mapping[str, Any]) -> dict[str, pathlib.Path]:
    """Return {name: directory} of the dense model and of the pruned ones.

    Args:
      values: Values of the flags.

    Raises:
      InputError: A model is missing, given twice, or not a directory; or there is a mesh.
    """
    if not values["model"]:
        raise InputError(
            "is missing", "give the dense model; `pruned` names those to compare", field="model"
        )
    if values["mesh"]:
        raise InputError("does not apply: speed is measured on one device", field="mesh")
    pruned = [part.strip() for part in values["pruned"].split(",") if part.strip()]
    names = [hub.at_revision(values["model"], values["revision"]), *pruned]
    directories = {name: hub.resolve(name) for name in names}
    if len(directories) < len(names):
        raise InputError(f"--model and --pruned name a model twice: {', '.join(names)}")
    for name, path in directories.items():
        if not path.is_dir():
            raise InputError(f"--what=speed needs Hugging Face directories, not {name}")
    return directories


def _reports(directories: Mapping[str, pathlib.Path], dense: str) -> dict[str, dict[str, Any]]:
    """Return the report of each pruned model, by its name.

    Raises:
      InputError: A directory has none.
    """
    reports = {}
    for name, path in directories.items():
        if name == dense:
            continue
        try:
            reports[name] = read_report(path)
        except (OSError, ValueError, KeyError, TypeError):
            reason, remedy = f"finds no report in {name}", "leave it out"
            raise InputError(reason, remedy, field="report") from None
    return reports


def speed_of(results: Mapping[str, Mapping[str, Facts]], dense: str, pruned: str) -> dict[str, Any]:
    """Return what a pruned model's report says of its speed.

    Args:
      results: Output of `summarise` by batch size.
      dense: Name of the dense model.
      pruned: Name of the pruned one.

    Returns:
      `device`, and in `batches` by batch size and part: tokens a second of both, and the
      `speedup`, the median over pairs of runs.
    """

    def figures(rows: Mapping[str, Facts], part: str) -> dict[str, float]:
        both = {"dense": rows[dense], "pruned": rows[pruned]}
        rates = {model: row["tokens_per_second"][part] for model, row in both.items()}
        return rates | {"speedup": rows[pruned]["speedup"][part]}

    parts = ("prompt", "generation")
    batches = {batch: {p: figures(rows, p) for p in parts} for batch, rows in results.items()}
    return {"device": jax.devices()[0].device_kind, "batches": batches}


def origins(directories: Mapping[str, pathlib.Path]) -> Facts:
    """Return what the report's `protocol` says about the models that come from the hub.

    Args:
      directories: Directory of each model, the dense one first.
    """
    dense, *_ = directories.values()
    pruned = {name: source_of(path) for name, path in directories.items() if path != dense}
    of_pruned = {name: source._asdict() for name, source in pruned.items() if source}
    return model_origin(dense) | ({"pruned": of_pruned} if of_pruned else {})


def run(values: Mapping[str, Any]) -> None:
    """Measure, print tables, and write the files that --json and --plot name.

    Args:
      values: Values of the flags.
    """
    directories, batches = checkpoints(values), batch_sizes(values["batch_sizes"])
    if values["plot"] and pathlib.Path(values["plot"]).suffix not in (".svg", ".png"):
        raise InputError("must end in .svg or .png", field="plot", value=values["plot"])
    dense = next(iter(directories))  # its name, with the revision
    reports = _reports(directories, dense) if values["report"] else {}
    new_tokens, configs = values["new_tokens"], [read_config(p) for p in directories.values()]
    prompt = prompt_length(values["prompt_length"], new_tokens, configs)
    task = Task(directories[dense], values["dtype"], batches[0], prompt, new_tokens)
    peak = measure({"peak": (matmul_peak, task)}, 0)["peak"]["flops_per_second"]
    results = {}
    for batch in batches:
        own = task._replace(batch=batch)
        programs: dict[str, tuple[Program, Task]] = {
            name: (topiary, own._replace(directory=path)) for name, path in directories.items()
        }
        if values["torch"] and importlib.util.find_spec("torch"):
            programs[TORCH] = (pytorch, own)
        results[str(batch)] = summarise(measure(programs, values["runs"]), own, peak)
    title = f"prompts of {prompt} tokens"
    if prompt < values["prompt_length"]:
        title += f" (--prompt_length={values['prompt_length']} cut to the models' positions)"
    Console().print(f"{title}, {new_tokens} new tokens; peak {peak / 1e9:.0f} GFLOP/s")
    for size, rows in results.items():
        Console().print(*tables(size, rows))
    work = {"prompt_length": prompt, "new_tokens": new_tokens, "dtype": values["dtype"]}
    for name, report in reports.items():
        report["speed"] = work | speed_of(results, dense, name)
        write_reports(directories[name], report)
    doubts = doubtful(results)
    for doubt in doubts:
        console.note(f"warning: {doubt}")
    if values["json"]:
        report = {
            "model": values["model"],
            "what": "speed",
            **work,
            "peak_flops_per_second": peak,
            "protocol": origins(directories) | protocol({}),
            "figures": results,
            "warnings": doubts,
        }
        write_report(values["json"], report)
    if values["plot"]:
        speed_plot.save_speed(results, pathlib.Path(values["plot"]))
