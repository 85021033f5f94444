"""`launch.bench --what=speed`: prompt latency and generation throughput, dense against pruned, as SLEB (Song et al. 2024) has them.

Each model and batch size has a process of its own, so its peak memory is its own; the processes of one batch size take turns, so that a
machine whose speed drifts slows all of them.
"""

import importlib.util
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.size import count_entries, peak_memory
from launch.flags.cli import Flags
from launch.flags.common import DTYPES
from launch.report import plots, summary
from launch.run.measure import protocol, write_report
from models.checkpoint import hub
from models.checkpoint.reader import in_memory, open_checkpoint, read_config
from models.errors import InputError

TORCH = "PyTorch, dense"


class Task(NamedTuple):
    """What a process measures: prompts of `prompt` tokens, `batch` at a time, and the `new_tokens` after them."""

    directory: pathlib.Path
    dtype: str
    batch: int
    prompt: int
    new_tokens: int


class Times(NamedTuple):
    """Seconds to process the prompts up to the first new token's logits, and to generate the tokens after that one."""

    prompt: float
    generation: float


Once = Callable[[], Times]
Facts = dict[str, Any]


def flags(f: Flags) -> None:
    """The flags of this measurement."""
    f.group("Speed (--what=speed)")
    f.string("pruned", "", "comma-separated checkpoints to compare with --model, the dense one")
    f.integer("prompt_length", 2048, "tokens of a prompt, as far as the models' positions go", 1)
    f.integer("new_tokens", 128, "tokens generated after each prompt", 2)
    f.string("batch_sizes", "1", "comma-separated: how many prompts at a time")
    f.string("plot", None, "file to draw the figures to: .svg or .png")


def topiary(task: Task) -> tuple[Once, Facts]:
    """Our compiled programs. Facts: parameters, and FLOPs and bytes of the prompt and of one token as XLA counts them."""
    import jax
    import jax.numpy as jnp

    from models.generate import decode, prefill

    arch, non_block, blocks = in_memory(open_checkpoint(task.directory, DTYPES[task.dtype]).model)
    prompts = jnp.asarray(
        np.random.default_rng(0).integers(0, arch.config.vocab, (task.batch, task.prompt), np.int32)
    )
    start, nothing = jnp.int32(task.prompt), jnp.zeros((0,), jnp.int32)
    lowered = prefill.lower(arch, non_block, blocks, prompts, task.prompt + task.new_tokens)
    first = lowered.compile()
    rest = decode.lower(
        arch, non_block, blocks, *lowered.out_info, start, task.new_tokens, None, nothing
    ).compile()

    def once() -> Times:
        begin = time.perf_counter()
        state = jax.block_until_ready(first(non_block, blocks, prompts))
        middle = time.perf_counter()
        jax.block_until_ready(rest(non_block, blocks, *state, start, None, nothing))
        return Times(middle - begin, time.perf_counter() - middle)

    # The loop of `decode` ends by what it finds, so XLA counts its body once: what a token costs.
    costs = {"prompt": first.cost_analysis(), "token": rest.cost_analysis()}
    counted = {
        name: {part: (c or {}).get(key) for part, c in costs.items()}
        for name, key in COUNTED.items()
    }
    return once, {"parameters": count_entries((non_block, blocks)), **counted}


COUNTED = {"flops": "flops", "bytes": "bytes accessed"}


def pytorch(task: Task) -> tuple[Once, Facts]:
    """The same work in PyTorch with transformers' own cache and attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        task.directory, dtype=getattr(torch, task.dtype)
    ).eval()
    vocab = model.config.vocab_size
    prompts = torch.from_numpy(
        np.random.default_rng(0).integers(0, vocab, (task.batch, task.prompt))
    )

    @torch.no_grad()
    def once() -> Times:
        begin = time.perf_counter()
        out = model(prompts, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(task.new_tokens - 1):
            token = out.logits[:, -1].argmax(-1)
            out = model(token[:, None], past_key_values=out.past_key_values, use_cache=True)
        return Times(middle - begin, time.perf_counter() - middle)

    return once, {"parameters": sum(p.numel() for p in model.parameters())}


def matmul_peak(task: Task) -> tuple[Once, Facts]:
    """Facts: FLOPs a second of a large matrix product in the task's type, the best of a few: what the device can do."""
    from eval.peak import flops_per_second

    return lambda: Times(0.0, 0.0), {"flops_per_second": flops_per_second(DTYPES[task.dtype])}


Program = Callable[[Task], tuple[Once, Facts]]


def _work(program: Program, task: Task, pipe: Any) -> None:
    """A process: load, warm up, say what is known, then one run for every True; at the end the peak memory."""
    # Several processes share a device: none may take all of its memory beforehand.
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
    """A program in a process of its own, which has begun to load."""

    def __init__(self, program: Program, task: Task):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(program, task, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def _receive(self) -> Any:
        try:
            found = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a benchmark's process ended with {self._process.exitcode}"
            ) from None
        if isinstance(found, InputError):
            raise found
        return found

    def facts(self) -> Facts:
        """What the program says of itself, once it is loaded, compiled and warm."""
        return self._receive()

    def once(self) -> Times:
        """The seconds of one run."""
        self._pipe.send(True)
        return self._receive()

    def close(self) -> dict[str, int | None]:
        """End the process; its peak memory in bytes, on the host and on the device."""
        self._pipe.send(False)
        peak = self._receive()
        self._process.join()
        return peak

    def stop(self) -> None:
        """End the process whatever it does; nothing to do after `close`."""
        self._process.terminate()
        self._process.join()


def measure(programs: Mapping[str, tuple[Program, Task]], runs: int) -> dict[str, Facts]:
    """{name: facts with "times" (one Times a run, in turn) and "peak_memory_bytes"}; loaded one after the other, run in turn."""
    workers: dict[str, Worker] = {}
    found: dict[str, Facts] = {}
    try:
        for name, (program, task) in programs.items():
            workers[name] = Worker(program, task)
            found[name] = workers[name].facts() | {"times": []}
        for _ in range(runs):
            for name, worker in workers.items():
                found[name]["times"].append(worker.once())
        return {name: f | {"peak_memory_bytes": workers[name].close()} for name, f in found.items()}
    finally:
        for worker in workers.values():
            worker.stop()


def figures_of(found: Mapping[str, Facts], task: Task, peak: float) -> dict[str, Facts]:
    """What is reported of each program: seconds, tokens a second, speed-up over the first, pair by pair, and shares of the peak.

    Args:
      found: what `measure` gives, the dense model first; peak: FLOPs a second of the device.
    """
    base, rows = next(iter(found.values()))["times"], {}
    tokens = {"prompt": task.batch * task.prompt, "generation": task.batch * (task.new_tokens - 1)}
    for name, own in found.items():
        seconds = {part: [getattr(t, part) for t in own["times"]] for part in tokens}
        median = {part: statistics.median(s) for part, s in seconds.items()}
        row = {key: value for key, value in own.items() if key != "times"} | {
            "generated": tokens["generation"],
            "seconds": seconds,
            "median": median,
            "tokens_per_second": {part: n / median[part] for part, n in tokens.items()},
            "speedup": {
                part: statistics.median(
                    getattr(b, part) / s for b, s in zip(base, seconds[part], strict=True)
                )
                for part in tokens
            },
        }
        if own.get("flops", {}).get("prompt") and own["flops"]["token"]:
            steps = {"prompt": 1, "generation": task.new_tokens - 1}
            flops = {"prompt": own["flops"]["prompt"], "generation": own["flops"]["token"]}
            row["share_of_peak"] = {
                part: flops[part] * n / median[part] / peak for part, n in steps.items()
            }
        rows[name] = row
    return rows


def tables_of(batch: str, rows: Mapping[str, Facts]) -> list[Table]:
    """The figures of one batch size for the terminal: what is felt, and the work behind it."""
    felt = Table(
        "",
        "prompt, s",
        "faster",
        "tokens/s",
        "faster",
        title=f"batch {batch}: median (least-most)",
        title_justify="left",
    )
    work = Table(
        "",
        "memory",
        "GFLOP, prompt",
        "of peak",
        "MB, token",
        title=f"batch {batch}: work",
        title_justify="left",
    )
    for name, f in rows.items():
        seconds, rates = (
            f["seconds"]["prompt"],
            sorted(f["generated"] / s for s in f["seconds"]["generation"]),
        )
        flops, moved, peak = f.get("flops", {}), f.get("bytes", {}), f["peak_memory_bytes"]
        felt.add_row(
            summary.shorten(name),
            f"{f['median']['prompt']:.3g} ({min(seconds):.3g}-{max(seconds):.3g})",
            f"{f['speedup']['prompt']:.2f}x",
            f"{f['tokens_per_second']['generation']:.3g} ({rates[0]:.3g}-{rates[-1]:.3g})",
            f"{f['speedup']['generation']:.2f}x",
        )
        work.add_row(
            summary.shorten(name),
            summary.size(peak["device"] or peak["host"]),
            f"{flops['prompt'] / 1e9:.4g}" if flops.get("prompt") else summary.ABSENT,
            summary.percent(f.get("share_of_peak", {}).get("prompt")),
            f"{moved['token'] / 1e6:.4g}" if moved.get("token") else summary.ABSENT,
        )
    return [felt, work]


def lengths(prompt: int, new_tokens: int, configs: Sequence[Mapping[str, Any]]) -> int:
    """The prompt's length, shortened to what leaves all models positions for the new tokens; InputError where nothing is left."""
    room = (
        min(int(c.get("max_position_embeddings", prompt + new_tokens)) for c in configs)
        - new_tokens
    )
    if room < 1:
        raise InputError(f"--new_tokens={new_tokens} leaves no position for a prompt: give fewer")
    return min(prompt, room)


def sizes(text: str) -> list[int]:
    """The batch sizes of a comma-separated flag; InputError for anything but positive integers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(
            f"--batch_sizes={text!r} must be positive integers with commas between, such as 1,8"
        )
    return [int(part) for part in parts]


def checkpoints(values: Mapping[str, Any]) -> dict[str, pathlib.Path]:
    """{name: directory} of the dense model and of the pruned ones; InputError for what is missing, given twice, or no directory."""
    if not values["model"]:
        raise InputError(
            "--model is missing: give the dense model, --pruned has those to compare with it"
        )
    if values["mesh"]:
        raise InputError("--mesh: the speed is that of one device: leave --mesh out")
    given = [
        values["model"],
        *(part.strip() for part in values["pruned"].split(",") if part.strip()),
    ]
    found = {name: hub.resolve(name) for name in given}
    if len(found) < len(given):
        raise InputError(f"--model and --pruned name a model twice: {', '.join(given)}")
    for name, path in found.items():
        if not path.is_dir():
            raise InputError(f"--what=speed needs Hugging Face directories, not {name}")
    return found


def run(values: Mapping[str, Any]) -> None:
    """Measure, print the table, write what `--json` and `--plot` ask for."""
    found, batches = checkpoints(values), sizes(values["batch_sizes"])
    if values["plot"] and pathlib.Path(values["plot"]).suffix not in (".svg", ".png"):
        raise InputError(f"--plot={values['plot']} must end in .svg or .png")
    dense, new_tokens = found[values["model"]], values["new_tokens"]
    prompt = lengths(
        values["prompt_length"], new_tokens, [read_config(path) for path in found.values()]
    )
    task = Task(dense, values["dtype"], batches[0], prompt, new_tokens)
    reference = values["torch"] and importlib.util.find_spec("torch")
    peak = measure({"peak": (matmul_peak, task)}, 0)["peak"]["flops_per_second"]
    figures = {}
    for size in batches:
        own = task._replace(batch=size)
        programs: dict[str, tuple[Program, Task]] = {
            name: (topiary, own._replace(directory=path)) for name, path in found.items()
        }
        if reference:
            programs[TORCH] = (pytorch, own)
        figures[str(size)] = figures_of(measure(programs, values["runs"]), own, peak)
    shortened = f" (--prompt_length={values['prompt_length']}, as far as the positions go)" * (
        prompt < values["prompt_length"]
    )
    title = (
        f"prompts of {prompt} tokens{shortened}, {new_tokens} new; peak {peak / 1e9:.0f} GFLOP/s"
    )
    Console().print(title)
    for batch, rows in figures.items():
        Console().print(*tables_of(batch, rows))
    if values["json"]:
        about = {
            "model": values["model"],
            "what": "speed",
            "prompt_length": prompt,
            "new_tokens": new_tokens,
        }
        stamp = {"peak_flops_per_second": peak, "dtype": values["dtype"], "protocol": protocol({})}
        write_report(values["json"], about | stamp | {"figures": figures})
    if values["plot"]:
        plots.save_speed(figures, pathlib.Path(values["plot"]))
