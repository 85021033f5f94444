"""Make the fuzz cases: a number decides what is damaged, how, and which command meets it."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import struct
from collections.abc import Callable
from typing import NamedTuple

from fuzz.mutations import encode, mutate_bytes, mutate_json
from fuzz.seeds import LENGTH

ODD_NUMBERS = (
    "-1", "0", "1", "2", "3", "0.5", "nan", "inf", "-inf", "1e999", "1e-400", "", " ", "x", "true",
    str(2**31 - 1), str(2**31), str(2**63), str(10**30), "1" * 5000, "٣", "0x10", "1_0", "½",
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "none", "~nobody_here/x", "x" * 300, "x" * 5000, "a\0b", "\udcff", "\n", "a\nb", "é",
    "../..", "/", ".", "/dev/null", "/dev/zero", "[red]x", "\x1b[31mx", "f(", "f(a=1)", "wanda()",
    "(" * 300, "magnitude(scope='row')", "wanda(x=1)", "2:4", "4:2", "0:4", "1" * 5000 + ":2",
    "data=2", "data=0", "data=-1", "model=2", "data=1,data=1", "data=" + "9" * 30, "owl", "dsnot",
    "llmrank(scorer={[]: 1})", "sleb(device_gib=1e999)", "owl(m=1e999)", "owl(m=-1)", "alpha",
    "wanda2048", "embedded", "wikitext2.txt", "embedded,embedded", ",", "flap(heads_removed=99)",
    "sparsegpt(damp=-1)", "sparsegpt(damp=1e30)", f"sleb(blocks={10**30})", "sleb(blocks=2)",
)  # fmt: skip
NUMBERS = (
    "sparsity", "calibration_samples", "calibration_length", "calibration_batch",
    "calibration_draws", "seed", "eval_length", "eval_windows", "limit", "num_fewshot",
)  # fmt: skip
TEXTS = (
    "model", "method", "pattern", "allocation", "refine", "protocol", "calibration", "eval_data",
    "output", "dtype", "mesh", "layout", "output_format", "activations", "tasks", "flagfile",
)  # fmt: skip
SWITCHES = ("--noresume=1", "--resume=maybe", "--nodebug=x", "--", "-", "stray", "--zebra=1")
METHODS = (
    "magnitude", "wanda", "sparsegpt", "llmrank", "flap", "sleb(blocks=1)", "wanda_sp",
    "magnitude_sp", "multiflow", "sparsellm(iterations=1)", 'magnitude(scope="row")',
)  # fmt: skip


class Case(NamedTuple):
    """A command on damaged input.

    Attributes:
      command: `prune`, `plan` or `evaluate`.
      argv: Its arguments.
      output: Directory that it may write.
      about: What is damaged.
      whole: Whether a good end also draws the report and generates its samples, which takes longer
        than all the rest.
    """

    command: str
    argv: list[str]
    output: pathlib.Path
    about: str
    whole: bool


def make_case(number: int, seeds: pathlib.Path, work: pathlib.Path, only: str = "") -> Case:
    """Make a case; the same number always gives the same.

    Args:
      number: Number of the case.
      seeds: Directory of sound files.
      work: New directory for damaged ones.
      only: Name of the one kind to draw from; empty for all.
    """
    rng = random.Random(number)
    work.mkdir(parents=True)
    chosen = {k: share for k, share in KINDS.items() if only in ("", k.__name__)}
    kind = rng.choices(list(chosen), list(chosen.values()))[0]
    command, flags = kind(rng, seeds, work)
    output = work / "out"
    if command == "evaluate":
        base = [f"--model={seeds / 'llama'}", f"--eval_data={seeds / 'tokens.npy'}"]
    else:
        base = [
            f"--model={seeds / 'llama'}",
            "--method=magnitude",
            "--sparsity=0.5",
            f"--calibration={seeds / 'tokens.npy'}",
            f"--eval_data={seeds / 'tokens.npy'}",
            f"--calibration_length={LENGTH}",
            "--calibration_samples=4",
            f"--output={output}",
        ]
    base += [f"--eval_length={LENGTH}", "--eval_windows=2"]
    whole = kind is journal or rng.random() < 0.04
    return Case(command, [*base, *flags], output, f"{kind.__name__}: {flags}", whole)


Made = tuple[str, list[str]]


def _model(seeds: pathlib.Path, work: pathlib.Path, name: str, damaged: str) -> pathlib.Path:
    """Link a model's files into a new directory but for the damaged one."""
    model = work / "model"
    model.mkdir()
    for file in (seeds / name).iterdir():
        if file.name != damaged:
            (model / file.name).symlink_to(file)
    return model


def config(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Damage config.json, and now and then plan from it."""
    name = rng.choice(("llama", "llama", "opt"))
    model = _model(seeds, work, name, "config.json")
    text = (seeds / name / "config.json").read_text()
    (model / "config.json").write_bytes(mutate_json(text, rng))
    command = rng.choices(("prune", "plan"), (9, 1))[0]
    return command, [f"--model={model}", f"--method={rng.choice(METHODS)}"]


def companion(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Damage a tokenizer's or the generation's settings."""
    name = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    model = _model(seeds, work, "llama", name)
    text = (seeds / "llama" / name).read_text()
    (model / name).write_bytes(mutate_json(text, rng))
    flags = [f"--model={model}", f"--{rng.choice(('calibration', 'eval_data'))}=embedded"]
    return rng.choice(("prune", "evaluate")), flags[: 1 if rng.random() < 0.2 else 2]


def index(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Damage the index of shards."""
    name = "model.safetensors.index.json"
    model = _model(seeds, work, "sharded", name)
    (model / name).write_bytes(mutate_json((seeds / "sharded" / name).read_text(), rng))
    return "prune", [f"--model={model}"]


def weights(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Damage a file of weights of one of the formats."""
    name, file = rng.choice(
        (
            ("llama", "model.safetensors"),
            ("opt", "model.safetensors"),
            ("sharded", "model-00002-of-00002.safetensors"),
            ("msgpack", "flax_model.msgpack"),
            ("msgpack", "flax_model.msgpack"),
            ("bin", "pytorch_model.bin"),
        )
    )
    content = (seeds / name / file).read_bytes() if (seeds / name / file).exists() else b""
    model = _model(seeds, work, name, file)
    if file.endswith(".safetensors") and rng.random() < 0.5:
        size = struct.unpack("<Q", content[:8])[0]
        head = mutate_json(content[8 : 8 + size].decode(), rng)
        content = struct.pack("<Q", len(head)) + head + content[8 + size :]
    else:
        content = mutate_bytes(content, rng)
    (model / file).write_bytes(content)
    return "prune", [f"--model={model}"]


def gguf(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Damage a GGUF file, half the time read with its tokenizer."""
    path = work / "model.gguf"
    path.write_bytes(mutate_bytes((seeds / "model.gguf").read_bytes(), rng))
    more = [f"--calibration={seeds / 'texts.txt'}"] if rng.random() < 0.5 else []
    return rng.choices(("prune", "plan"), (9, 1))[0], [f"--model={path}", *more]


def data(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Damage a file of tokens or texts."""
    suffix = rng.choice(("npy", "npy", "jsonl", "json", "txt", "raw", "jsonl.gz", "parquet"))
    name = "tokens.npy" if suffix == "npy" else f"texts.{suffix}"
    content = (seeds / name).read_bytes()
    if suffix == "jsonl" and rng.random() < 0.6:
        lines = content.decode().splitlines()
        lines[rng.randrange(len(lines))] = mutate_json(lines[0], rng).decode("utf-8", "replace")
        content = "\n".join(lines).encode("utf-8", "replace")
    elif suffix == "json" and rng.random() < 0.6:
        content = mutate_json(content.decode(), rng)
    elif suffix in ("txt", "raw") or (suffix in ("jsonl", "json") and rng.random() < 0.5):
        content = encode(content.decode(), rng)
    else:
        content = mutate_bytes(content, rng)
    (work / name).write_bytes(content)
    purpose = rng.choice(("calibration", "eval_data"))
    command = "plan" if suffix == "npy" and rng.random() < 0.2 else "prune"
    return command, [f"--{purpose}={work / name}"]


def flag_file(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Damage a flag file, nest it, or let files name one another."""
    path = work / "x.flags"
    content = (seeds / rng.choice(("inner.flags", "outer.flags"))).read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(mutate_bytes(content, rng))
    elif kind == 1:
        path.write_bytes(encode(content.decode(), rng))
    elif kind == 2:
        depth = rng.choice((3, 60, 3000))
        for k in range(depth):
            (work / f"{k}.flags").write_text(f"--flagfile={work / f'{k + 1}.flags'}\n")
        (work / f"{depth}.flags").write_bytes(content)
        path = work / "0.flags"
    else:
        path.write_text(f"--flagfile={path}\n")
    return "prune", [f"--flagfile={path}"]


def flags(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Give flags odd values."""
    chosen = []
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.randrange(8)
        if kind == 0:
            chosen.append(rng.choice(SWITCHES))
        elif kind < 4:
            chosen.append(f"--{rng.choice(NUMBERS)}={rng.choice(ODD_NUMBERS)}")
        else:
            chosen.append(f"--{rng.choice(TEXTS)}={rng.choice(ODD_TEXTS)}")
    if rng.random() < 0.5:
        # The embedded text takes counts as they are, where a token file has its own.
        chosen.append("--calibration=embedded")
    return rng.choices(("prune", "plan"), (5, 1))[0], chosen


def paths(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Put something that is no file in a file's place."""
    flag, suffix = rng.choice(
        (
            ("model", ".gguf"),
            ("model", "/config.json"),
            ("model", "/tokenizer.json"),
            ("model", "/model.safetensors"),
            ("calibration", ".npy"),
            ("calibration", ".jsonl"),
            ("eval_data", ".parquet"),
            ("flagfile", ""),
            ("tasks", ".yaml"),
        )
    )
    inside = suffix.startswith("/")
    model = _model(seeds, work, "llama", suffix[1:]) if inside else work
    place = model / suffix[1:] if inside else work / f"x{suffix}"
    kind = rng.choice(("fifo", "directory", "device", "loop", "absent", "closed", "long", "below"))
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "directory":
        place.mkdir()
    elif kind in ("device", "loop", "below"):
        targets = {"device": "/dev/zero", "loop": place.name, "below": "/etc/passwd/x"}
        place.symlink_to(targets[kind])
    elif kind == "closed":
        place.write_bytes(b"x")
        place.chmod(0)
    elif kind == "long" and not inside:
        place = work / ("x" * 300 + suffix)
    more = ["--trust_task_files"] if flag == "tasks" else []
    if suffix == "/tokenizer.json":
        more = ["--calibration=embedded"]
    return "prune", [f"--{flag}={model if inside else place}", *more]


def task(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Damage the YAML file of a task."""
    shutil.copytree(seeds / "task", work / "task")
    path = work / "task" / "stories.yaml"
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    return "evaluate", [f"--tasks={path}", "--trust_task_files", "--notask_cache"]


def journal(rng: random.Random, seeds: pathlib.Path, work: pathlib.Path) -> Made:
    """Damage, cut or remove a file of an interrupted run, and repeat the command.

    Its result, `out` of the sound files, is the only right one.
    """
    shutil.copytree(seeds / ".out.unfinished", work / ".out.unfinished")
    files = sorted(p for p in (work / ".out.unfinished").rglob("*") if p.is_file())
    file = rng.choice(files)
    if rng.random() < 0.2:
        file.unlink()
    else:
        file.write_bytes(mutate_bytes(file.read_bytes(), rng))
    (work / "right").symlink_to(seeds / "out")
    return "prune", ["--method=wanda"]


KINDS: dict[Callable[[random.Random, pathlib.Path, pathlib.Path], Made], float] = {
    config: 22,
    companion: 10,
    index: 5,
    weights: 14,
    gguf: 12,
    data: 15,
    flag_file: 4,
    flags: 12,
    paths: 5,
    task: 1,
    journal: 2,
}


def read_report(output: pathlib.Path) -> dict[str, object]:
    """Return the report of a finished run; empty if it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((output / "pruning_report.json").read_text())
    return {}
