"""Time the calibration walk, against PyTorch's forward of the same model where torch is installed.

    python -m launch.bench --model=DIR --calibration=tokens.npy

Both run in turn in this one process, after a warm-up each, so that a machine whose speed drifts slows both: quote the ratio.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from calibration.data import calibration_tokens
from calibration.fold import Stats, fold_blocks
from calibration.observers import batch_norms, second_moment
from launch import summary
from launch.cli import Flags, run
from launch.flags import check_length, mesh_of, model_flags, open_model, window_length
from launch.measure import protocol, tokenizer_of, write_report
from models.arch import Block, Model
from models.store import Checkpoint, in_memory


def options() -> Flags:
    """The flags of `launch.bench`."""
    f = Flags("launch.bench", __doc__ or "")
    model_flags(f)
    f.group("Calibration")
    f.string("calibration", "embedded", "embedded, wikitext2, c4, ptb, or a .npy, .txt, .jsonl, .parquet file")
    f.integer("calibration_samples", 12, "how many windows", 1)
    f.integer("calibration_length", 512, "tokens in a window; 0: what the model was made for", 0)
    f.integer("calibration_batch", 4, "windows at a time", 1)
    f.integer("seed", 0, "of the windows drawn")
    f.group("Measurement")
    f.integer("runs", 5, "timed runs of each, after one warm-up", 1)
    f.boolean("torch", True, "time PyTorch's forward too, if torch is installed")
    f.string("json", None, "file to write the figures to")
    return f


def calibration_walks(model: Model, tokens: np.ndarray, batch: int, mesh: Any) -> dict[str, Callable[[], Any]]:
    """The walks to time: Wanda's statistics of every linear's input, LLMRank's of the feed-forward part, each a dense forward."""
    slots = {s.name: s.reads for s in model.arch.slots}
    group = model.arch.group("neurons")
    up, down = group.writers[-1].name, group.reader.name
    watches = {
        "Wanda statistics": dict.fromkeys(slots.values(), second_moment),
        "LLMRank statistics": dict.fromkeys((slots[up], slots[down], up, down), batch_norms),
    }

    def walk(watch: dict[str, Any]) -> None:
        kept = []

        def visit(i: int, block: Block, stats: Stats) -> Block:
            kept.append(stats)
            return block

        fold_blocks(model, tokens, visit, watch=watch, propagate="dense", batch=batch, mesh=mesh)
        jax.block_until_ready(kept)

    return {name: functools.partial(walk, watch) for name, watch in watches.items()}


def torch_forward(checkpoint: Checkpoint, tokens: np.ndarray, batch: int) -> Callable[[], Any] | None:
    """PyTorch's forward through the decoder (no head) with transformers' own attention, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval().get_decoder()
    batches = [torch.tensor(tokens[i : i + batch].astype(np.int64)) for i in range(0, len(tokens), batch)]

    def forward() -> None:
        with torch.no_grad():
            for ids in batches:
                model(ids, use_cache=False)

    return forward


def time_in_turn(programs: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of every program, `runs` times, in turn: A B A B ..., after one warm-up of each."""
    for program in programs.values():
        program()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main(values: dict[str, Any]) -> None:
    """Measure, print a table, write the figures where `--json` says."""
    mesh = mesh_of(values["mesh"], values["calibration_batch"])
    checkpoint = open_model(values["model"], values["dtype"])
    length = window_length(values["calibration_length"], checkpoint)
    tokens = calibration_tokens(
        values["calibration"],
        tokenizer_of(checkpoint),
        samples=values["calibration_samples"],
        length=length,
        seed=values["seed"],
        vocab=checkpoint.model.arch.config.vocab,
    )
    check_length("--calibration", tokens.ids.shape[1], checkpoint)
    programs = calibration_walks(in_memory(checkpoint.model), tokens.ids, values["calibration_batch"], mesh)
    reference = torch_forward(checkpoint, tokens.ids, values["calibration_batch"]) if values["torch"] else None
    if reference:
        programs["PyTorch forward"] = reference
    seconds = time_in_turn(programs, values["runs"])
    base = seconds[list(programs)[-1]]
    table = Table(
        "",
        "median",
        "least",
        "most",
        "tokens/s",
        f"time against {list(programs)[-1]}",
        title=str(values["model"]),
        title_justify="left",
    )
    figures = {}
    for name, s in seconds.items():
        # Pair by pair: both of a pair ran at about the same time.
        ratio = statistics.median(a / b for a, b in zip(s, base, strict=True))
        figures[name] = {"seconds": s, "median": statistics.median(s), "ratio": ratio}
        rate = summary.count(round(tokens.ids.size / statistics.median(s)))
        table.add_row(name, *(summary.duration(f(s)) for f in (statistics.median, min, max)), rate, f"{ratio:.2f}x")
    Console().print(table)
    if values["json"]:
        stamp = protocol({}) | {"calibration": tokens.protocol, "batch": values["calibration_batch"]}
        write_report(values["json"], {"model": values["model"], "figures": figures, "protocol": stamp})


if __name__ == "__main__":
    sys.exit(run(options(), main))
