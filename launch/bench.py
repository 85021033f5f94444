"""Time the calibration walk, or whole pruning runs, against PyTorch where torch is installed.

    python -m launch.bench --model=DIR --calibration=tokens.npy
    python -m launch.bench --what=sparsegpt --model=DIR --calibration=tokens.npy
    python -m launch.bench --what=neuroal --model=DIR --calibration=tokens.npy --sparsity=0.7
    python -m launch.bench --what=sleb --model=DIR --calibration=tokens.npy --sparsity=0.2
    python -m launch.bench --what=speed --model=DENSE --pruned=DIR,DIR --batch_sizes=1,8

--what=calibration: statistics of every block against PyTorch's forward. sparsegpt: a whole run against SparseGPT written plainly in
PyTorch. sparsellm: a whole run, with the default of four iterations and with two, against four of the released loop of pseudo-inverses, in
our code and plainly in PyTorch. neuroal: the search of both steps with Wanda against the released search, and as many trials one after the
other in PyTorch. sleb: the search with and without kept hidden states, against whole forwards in PyTorch. speed: prompt processing and
generation of a dense and of pruned checkpoints. The programs run in turn, so that a machine whose speed drifts slows all of them: quote the
ratio. Pruning runs are processes of their own, compilation included, with their peak memory. All windows of a `.npy` file are taken: cut it
to a few for the searches.
"""

import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from calibration.observers import batch_norms, second_moment
from calibration.passes import Stats, calibrate_blocks
from calibration.runtime import Runtime
from launch.benchmarks import solvers as bench_solvers
from launch.benchmarks import speed as bench_speed
from launch.benchmarks.solvers import Run
from launch.flags.cli import Flags, run
from launch.flags.common import check_sparsity, mesh_of, model_flags, open_model
from launch.report import summary
from launch.run.measure import protocol, read_calibration, tokenizer_of, write_report
from models.arch import Block, Model
from models.checkpoint.reader import Checkpoint, in_memory
from models.errors import InputError

T = TypeVar("T")


def options() -> Flags:
    """The flags of `launch.bench`."""
    f = Flags("launch.bench", __doc__ or "")
    model_flags(f)
    f.group("Calibration")
    f.string(
        "calibration",
        "embedded",
        "embedded, wikitext2, c4, ptb, or a .npy, .txt, .jsonl, .parquet file",
    )
    f.integer("calibration_samples", 12, "how many windows", 1)
    f.integer("calibration_length", 512, "tokens in a window; 0: what the model was made for", 0)
    f.integer("calibration_batch", 4, "windows at a time", 1)
    f.integer("seed", 0, "of the windows drawn")
    f.group("Measurement")
    f.choice(
        "what",
        "calibration",
        ("calibration", "sparsegpt", "sparsellm", "neuroal", "sleb", "speed"),
        "what is timed",
    )
    f.number("sparsity", 0.5, "of the pruning runs")
    f.integer("blocks", 0, "how many blocks the pruning runs prune; 0: all")
    f.integer("runs", 5, "timed runs of each, for calibration after one warm-up", 1)
    f.boolean("torch", True, "time PyTorch too, if torch is installed")
    f.string("json", None, "file to write the figures to")
    bench_speed.flags(f)
    return f


def calibration_walks(
    model: Model, tokens: np.ndarray, batch: int, mesh: Any
) -> dict[str, Callable[[], Any]]:
    """The walks to time: Wanda's statistics of every linear's input, LLMRank's of the feed-forward part, each a dense forward."""
    group, tap = model.arch.group("neurons"), model.arch.tap
    up, down = group.writers[-1].name, group.reader.name
    watches = {
        "Wanda statistics": {s.reads: second_moment for s in model.arch.slots},
        "LLMRank statistics": dict.fromkeys((tap(up), tap(down), up, down), batch_norms),
    }

    def walk(watch: dict[str, Any]) -> None:
        kept = []

        def visit(i: int, block: Block, stats: Stats) -> tuple[Block, None]:
            kept.append(stats)
            return block, None

        calibrate_blocks(
            model,
            tokens,
            Runtime(batch, mesh),
            visit,
            watch=watch,
            propagate="dense",
            name="calibrating",
        )
        jax.block_until_ready(kept)

    return {name: functools.partial(walk, watch) for name, watch in watches.items()}


def torch_forward(
    checkpoint: Checkpoint, tokens: np.ndarray, batch: int
) -> Callable[[], Any] | None:
    """PyTorch's forward through the decoder (no head) with transformers' own attention, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
        .eval()
        .get_decoder()
    )
    batches = [
        torch.tensor(tokens[i : i + batch].astype(np.int64)) for i in range(0, len(tokens), batch)
    ]

    def forward() -> None:
        with torch.no_grad():
            for ids in batches:
                model(ids, use_cache=False)

    return forward


def in_turn(programs: dict[str, Callable[[], T]], runs: int) -> dict[str, list[T]]:
    """What every program gives, `runs` times, in turn: A B A B ..."""
    found: dict[str, list[T]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, program in programs.items():
            found[name].append(program())
    return found


def seconds_of(program: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


def time_in_turn(programs: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of every program, `runs` times, in turn, after one warm-up of each."""
    for program in programs.values():
        program()
    return in_turn(
        {name: functools.partial(seconds_of, program) for name, program in programs.items()}, runs
    )


def calibration(
    values: dict[str, Any], checkpoint: Checkpoint, tokens: np.ndarray
) -> dict[str, list[Run]]:
    """The calibration walks, and PyTorch's forward; the last is what the others are compared with."""
    batch = values["calibration_batch"]
    programs = calibration_walks(
        in_memory(checkpoint.model), tokens, batch, mesh_of(values["mesh"], batch)
    )
    reference = torch_forward(checkpoint, tokens, batch) if values["torch"] else None
    if reference:
        programs["PyTorch forward"] = reference
    return {
        name: [Run(s, None) for s in seconds]
        for name, seconds in time_in_turn(programs, values["runs"]).items()
    }


def solvers(
    values: dict[str, Any], checkpoint: Checkpoint, tokens: np.ndarray
) -> dict[str, list[Run]]:
    """Whole pruning runs, in turn."""
    if not checkpoint.directory.is_dir():
        raise InputError(
            f"--what={values['what']} needs a model in a Hugging Face directory, not {values['model']}"
        )
    task = bench_solvers.Task(
        checkpoint.directory,
        tokens,
        values["sparsity"],
        values["calibration_batch"],
        values["blocks"],
    )
    ours = functools.partial(bench_solvers.alone, bench_solvers.topiary, task)
    programs: dict[str, Callable[[], Run]] = {}
    torch = values["torch"] and importlib.util.find_spec("torch")
    if values["what"] == "sparsellm":
        programs["SparseLLM"] = functools.partial(ours, "sparsellm")
        programs["of two iterations"] = functools.partial(ours, "sparsellm(iterations=2)")
        programs["released loop"] = functools.partial(ours, 'sparsellm(variant="official")')
        if torch and any(s.name == "gate" for s in checkpoint.model.arch.slots):
            programs["PyTorch, by pseudo-inverses"] = functools.partial(
                bench_solvers.alone, bench_solvers.plain_alternation, task
            )
    elif values["what"] == "sleb":
        programs["SLEB"] = functools.partial(ours, "sleb")
        programs["without its cache"] = functools.partial(ours, "sleb(device_gib=0, host_gib=0)")
        if torch:
            programs["PyTorch"] = functools.partial(
                bench_solvers.alone, bench_solvers.plain_removal, task
            )
    elif values["what"] == "neuroal":
        find = functools.partial(bench_solvers.alone, bench_solvers.search, task)
        programs["NeuroAL"] = functools.partial(find, f"neuroal(samples={len(tokens)})")
        programs["released search"] = functools.partial(
            find, f'neuroal(samples={len(tokens)}, variant="official")'
        )
        if torch:
            programs["PyTorch, trial by trial"] = functools.partial(
                bench_solvers.alone, bench_solvers.plain_search, task
            )
    else:
        programs["SparseGPT"] = functools.partial(ours, "sparsegpt")
        if torch:
            programs["PyTorch"] = functools.partial(
                bench_solvers.alone, bench_solvers.plain_sparsegpt, task
            )
    return in_turn(programs, values["runs"])


def figures_of(runs: dict[str, list[Run]], tokens: int) -> dict[str, dict[str, Any]]:
    """Medians, and ratios to the last program pair by pair: both of a pair ran at about the same time."""
    base, found = runs[list(runs)[-1]], {}
    for name, own in runs.items():
        seconds = [r.seconds for r in own]
        ratio = statistics.median(a.seconds / b.seconds for a, b in zip(own, base, strict=True))
        median = statistics.median(seconds)
        found[name] = {
            "seconds": seconds,
            "median": median,
            "ratio": ratio,
            "tokens_per_second": tokens / median,
        }
        found[name]["peak_memory_bytes"] = max((r.peak for r in own if r.peak), default=None)
    return found


def table_of(title: str, figures: dict[str, dict[str, Any]]) -> Table:
    """The figures as a table for the terminal."""
    heads = (
        "",
        "median",
        "least",
        "most",
        "tokens/s",
        "peak memory",
        f"time against {list(figures)[-1]}",
    )
    table = Table(*heads, title=title, title_justify="left")
    for name, f in figures.items():
        peak = f["peak_memory_bytes"]
        table.add_row(
            name,
            *(summary.duration(g(f["seconds"])) for g in (statistics.median, min, max)),
            summary.count(round(f["tokens_per_second"])),
            summary.size(peak) if peak else "",
            f"{f['ratio']:.2f}x",
        )
    return table


def main(values: dict[str, Any]) -> None:
    """Measure, print a table, write the figures where `--json` says."""
    if values["what"] == "speed":
        return bench_speed.run(values)
    check_sparsity(values["sparsity"])
    checkpoint = open_model(values["model"], values["dtype"])
    tokens = read_calibration(
        values["calibration"],
        values["calibration_samples"],
        values["calibration_length"],
        values["seed"],
        checkpoint,
        tokenizer_of(checkpoint),
    )
    measure = calibration if values["what"] == "calibration" else solvers
    figures = figures_of(measure(values, checkpoint, tokens.ids), tokens.ids.size)
    Console().print(table_of(str(values["model"]), figures))
    if values["json"]:
        stamp = protocol({}) | {
            "calibration": tokens.protocol,
            "batch": values["calibration_batch"],
        }
        write_report(
            values["json"],
            {
                "model": values["model"],
                "what": values["what"],
                "figures": figures,
                "protocol": stamp,
            },
        )


if __name__ == "__main__":
    sys.exit(run(options(), main))
