"""Time calibration, whole pruning runs or generation, against PyTorch where it is installed.

    python -m launch.bench --model=DIR --calibration=tokens.npy
    python -m launch.bench --what=sparsegpt --model=DIR --calibration=tokens.npy
    python -m launch.bench --what=neuroal --model=DIR --calibration=tokens.npy --sparsity=0.7
    python -m launch.bench --what=sleb --model=DIR --calibration=tokens.npy --sparsity=0.2
    python -m launch.bench --what=speed --model=DENSE --pruned=DIR,DIR --batch_sizes=1,8
    python -m launch.bench --what=all --model=DIR --calibration=tokens.npy --runs=1
    python -m launch.bench --what=plans --plans=llama-2-7b_v5e:4x4_wanda
    python -m launch.bench --what=device --device_methods=wanda,sparsegpt --device_shapes=tiny

--what selects the measurement:
  calibration  statistics of every block, against PyTorch's forward pass
  sparsegpt    a whole run, against SparseGPT written plainly in PyTorch
  admm         a whole run with the targets of the block and with own ones, against SparseGPT, and
               against the first in plain PyTorch
  sparsellm    a whole run with four iterations and with two, against four of the official loop of
               pseudo-inverses, ours and plainly in PyTorch
  neuroal      the search of both steps for Wanda, against the official search, and against as
               many trials one by one in PyTorch
  sleb         the search with and without its cache, against whole forward passes in PyTorch
  blocks       recovery block by block of a model without its smallest weights, against PyTorch
  distill      recovery by distillation of the same model, against PyTorch
  speed        prompt processing and generation of a dense model and of pruned ones
  all          every method and the perplexity: first in a process, with the programs of another
               process, and again, against plain PyTorch and the machine's arithmetic
  shares       every method: the share of each of its programs, compilation, reading and writing
  plans        LLaMA-2-7B and -70B on TPUs that are not there: memory, work and collectives of
               each method's programs, and how long they compile; needs libtpu, no model
  device       on the device that JAX finds: every method's results against the CPU's, and the
               programs of one block of random weights against the device's peaks; needs no model

The programs run in turn, so that a machine whose speed drifts slows all of them: quote the ratio.
Pruning runs have processes of their own, compilation included, with their peak memory. All
windows of a .npy file are used: cut it to a few for the searches.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibration.mixtures import SELF
from launch.benchmarks import (
    device,
    every,
    plans,
    shares,
    speed,
    torch_admm,
    torch_recovery,
    torch_solvers,
)
from launch.benchmarks.calibration import calibration_passes, torch_forward
from launch.benchmarks.recoveries import time_recovery
from launch.benchmarks.solvers import Program, Run, Task, run_in_process, time_method, time_search
from launch.benchmarks.timing import in_turn, summarise, time_in_turn
from launch.flags.cli import Flags, run
from launch.flags.common import TEXTS, mesh_of, model_flags, open_model
from launch.flags.compilation import OFF
from launch.flags.numbers import check_sparsity
from launch.report import summary
from launch.run.measure import model_origin, protocol, read_calibration, tokenizer_of, write_report
from models.checkpoint.reader import Checkpoint, in_memory
from models.errors import InputError

SOLVERS = ("sparsegpt", "admm", "sparsellm", "neuroal", "sleb")
RECOVERIES = {"blocks": torch_recovery.time_blocks, "distill": torch_recovery.time_distill}


def options() -> Flags:
    """Define the flags of `launch.bench`."""
    f = Flags("launch.bench", __doc__ or "")
    model_flags(f, compilation_cache=OFF)  # what it times includes compilation
    f.group("Calibration")
    f.string(
        "calibration",
        "embedded",
        "embedded, wikitext2, c4, ptb, self, a .npy, .txt, .jsonl, .parquet file, or a mix such as "
        "c4:0.5,FILE:0.5",
        names=(*TEXTS, SELF),
        files=True,
        several=True,
    )
    f.integer("calibration_samples", 12, "number of windows", 1)
    f.integer("calibration_length", 512, "tokens in a window; 0: the model's own length", 0)
    f.integer("calibration_batch", 4, "windows at a time", 1)
    f.integer("seed", 0, "seed of the calibration windows")
    f.group("Measurement")
    f.choice(
        "what",
        "calibration",
        (*SOLVERS, *RECOVERIES, "calibration", "speed", "all", "shares", "plans", "device"),
        "the measurement",
    )
    f.number("sparsity", 0.5, "sparsity of the pruning runs")
    f.integer("blocks", 0, "number of blocks that the pruning runs prune; 0: all")
    f.integer("steps", 16, "updates of a recovery, with blocks of each block", 1)
    f.integer("runs", 5, "timed runs of each program; calibration has a warm-up before", 1)
    f.boolean("torch", True, "time PyTorch too, if torch is installed")
    f.string("json", None, "file to write the results to")
    speed.flags(f)
    every.flags(f)
    plans.flags(f)
    device.flags(f)
    return f


def time_calibration(
    values: dict[str, Any], checkpoint: Checkpoint, tokens: np.ndarray
) -> dict[str, list[Run]]:
    """Time the calibration passes and PyTorch's forward pass.

    Args:
      values: Values of the flags.
      checkpoint: The model.
      tokens: Calibration windows, int [samples time].

    Returns:
      Runs by name; the others are compared with the last.
    """
    batch = values["calibration_batch"]
    model, mesh = in_memory(checkpoint.model), mesh_of(values["mesh"], batch)
    programs = calibration_passes(model, tokens, batch, mesh)
    reference = torch_forward(checkpoint, tokens, batch) if values["torch"] else None
    if reference:
        programs["PyTorch forward"] = reference
    seconds = time_in_turn(programs, values["runs"])
    return {name: [Run(s, None) for s in own] for name, own in seconds.items()}


def _task(values: dict[str, Any], checkpoint: Checkpoint, tokens: np.ndarray) -> Task:
    """Return the work of pruning runs in processes of their own.

    Raises:
      InputError: The model is not a Hugging Face directory.
    """
    if not checkpoint.directory.is_dir():
        raise InputError(
            f"--what={values['what']} needs a Hugging Face directory, not {values['model']}"
        )
    return Task(
        checkpoint.directory,
        tokens,
        values["sparsity"],
        values["calibration_batch"],
        values["blocks"],
    )


def time_solvers(
    values: dict[str, Any], checkpoint: Checkpoint, tokens: np.ndarray
) -> dict[str, list[Run]]:
    """Time whole pruning runs, each in its own process.

    Args:
      values: Values of the flags.
      checkpoint: The model.
      tokens: Calibration windows, int [samples time].

    Returns:
      Runs by name; the others are compared with the last.

    Raises:
      InputError: The model is not a Hugging Face directory.
    """
    what, task = values["what"], _task(values, checkpoint, tokens)

    def program(function: Program, argument: str = "") -> Callable[[], Run]:
        return functools.partial(run_in_process, function, task, argument)

    has_torch, is_gated = _has_torch(values), _is_gated(checkpoint)
    programs: dict[str, Callable[[], Run]] = {}
    if what == "admm":
        programs["ADMM"] = program(time_method, "admm")
        programs["own targets"] = program(time_method, 'admm(targets="own")')
        programs["SparseGPT"] = program(time_method, "sparsegpt")
        if has_torch and is_gated:
            programs["PyTorch"] = program(torch_admm.time_admm)
    elif what == "sparsellm":
        programs["SparseLLM"] = program(time_method, "sparsellm")
        programs["two iterations"] = program(time_method, "sparsellm(iterations=2)")
        programs["official loop"] = program(time_method, 'sparsellm(variant="official")')
        if has_torch and is_gated:
            programs["PyTorch, by pseudo-inverses"] = program(torch_solvers.time_sparsellm)
    elif what == "sleb":
        programs["SLEB"] = program(time_method, "sleb")
        programs["without its cache"] = program(time_method, "sleb(device_gib=0, host_gib=0)")
        if has_torch:
            programs["PyTorch"] = program(torch_solvers.time_sleb)
    elif what == "neuroal":
        n = len(tokens)
        official = f'neuroal(samples={n}, variant="official")'
        programs["NeuroAL"] = program(time_search, f"neuroal(samples={n})")
        programs["official search"] = program(time_search, official)
        if has_torch:
            programs["PyTorch, trial by trial"] = program(torch_solvers.time_neuroal_trials)
    elif what in RECOVERIES:
        programs[what] = program(time_recovery, f"{what}(steps={values['steps']})")
        if has_torch:
            programs["PyTorch"] = program(RECOVERIES[what], str(values["steps"]))
    else:
        programs["SparseGPT"] = program(time_method, "sparsegpt")
        if has_torch:
            programs["PyTorch"] = program(torch_solvers.time_sparsegpt)
    return in_turn(programs, values["runs"])


def _has_torch(values: dict[str, Any]) -> bool:
    """Return whether PyTorch is to be timed too."""
    return bool(values["torch"] and importlib.util.find_spec("torch"))


def _is_gated(checkpoint: Checkpoint) -> bool:
    """Return whether the feed-forward parts of a model are gated."""
    return any(s.name == "gate" for s in checkpoint.model.arch.slots)


def table(title: str, results: Mapping[str, dict[str, Any]]) -> Table:
    """Return the results as a table for the terminal.

    Args:
      title: Title of the table.
      results: Output of `summarise`.
    """
    heads = ("", "median", "min", "max", "tokens/s", "peak memory", f"vs {list(results)[-1]}")
    result = Table(*heads, title=Text(title), title_justify="left")
    for name, r in results.items():
        peak = r["peak_memory_bytes"]
        result.add_row(
            name,
            summary.duration(r["median"]),
            summary.duration(min(r["seconds"])),
            summary.duration(max(r["seconds"])),
            summary.count(round(r["tokens_per_second"])),
            summary.size(peak) if peak else "",
            f"{r['ratio']:.2f}x",
        )
    return result


def main(values: dict[str, Any]) -> int:
    """Measure, print a table, and write the results to --json; return the exit code."""
    what = values["what"]
    if what == "device":
        return device.run(values)
    if what in ("speed", "plans"):
        (speed if what == "speed" else plans).run(values)
        return 0
    check_sparsity(values["sparsity"])
    checkpoint = open_model(values["model"], values["dtype"], values["revision"])
    tokens = read_calibration(
        values["calibration"],
        values["calibration_samples"],
        values["calibration_length"],
        values["seed"],
        checkpoint,
        tokenizer_of(checkpoint),
    )
    results: dict[str, Any]
    if what == "all":
        task = _task(values, checkpoint, tokens.ids)
        results = every.measure(task, values, _has_torch(values), _is_gated(checkpoint))
        Console().print(every.table(str(values["model"]), results))
    elif what == "shares":
        results = shares.measure(
            every.chosen(values["rows"]), _task(values, checkpoint, tokens.ids)
        )
        Console().print(shares.table(str(values["model"]), results))
    else:
        time_programs = time_calibration if what == "calibration" else time_solvers
        results = summarise(time_programs(values, checkpoint, tokens.ids), tokens.ids.size)
        Console().print(table(str(values["model"]), results))
    if values["json"]:
        calibration = {"calibration": tokens.protocol, "batch": values["calibration_batch"]}
        report = {
            "model": values["model"],
            "what": what,
            "figures": results,
            "protocol": model_origin(checkpoint.directory) | protocol({}) | calibration,
        }
        write_report(values["json"], report)
    return 0


if __name__ == "__main__":
    sys.exit(run(options(), main))
