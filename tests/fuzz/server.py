"""Run commands in forked processes: Python and the libraries are loaded once, JAX starts in each.

JAX has threads once it has looked at its devices, and threads do not survive a fork, so the parent
never does.
"""

import importlib
import os
import pathlib
import resource
import signal
import sys
import time
import traceback
from typing import NamedTuple

import numpy as np
from fuzz.cases import Case, read_report

MOST_BYTES = 6 << 30
HUGE = 1e3  # weights of the sound files are below 3
MODULES = (
    "launch.prune",
    "launch.plan",
    "launch.evaluate",
    "models.checkpoint.gguf",
    "gguf",
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "transformers.models.auto.tokenization_auto",
    "tokenizers",
)


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
      code: Exit code; minus the signal's number if a signal ended it.
      seconds: Seconds that it ran.
      problem: What is wrong with that; empty if nothing.
      stderr: Standard error.
    """

    code: int
    seconds: float
    problem: str
    stderr: str


def preload() -> None:
    """Import what the commands import, so that no child has to."""
    for name in MODULES:
        importlib.import_module(name)
    try:
        import torch
    except ImportError:
        return
    # Threads of its own would not survive the fork.
    torch.set_num_threads(1)


def start(case: Case, said: pathlib.Path) -> int:
    """Start a case in a child.

    Args:
      case: The case.
      said: File for its standard error.

    Returns:
      The child's process id.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
        out = os.open(os.devnull, os.O_WRONLY)
        err = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(err, 2)
        # A result without a place of its own lands here.
        os.chdir(case.output.parent)
        module = importlib.import_module(f"launch.{case.command}")
        if case.command == "prune" and not case.whole:
            samples = importlib.import_module("launch.run.samples").Samples([], {})
            module.samples = lambda *_: samples
            html = importlib.import_module("launch.report.html")
            html.write_html = lambda *_: None
        cli = importlib.import_module("launch.flags.cli")
        code = cli.run(module.options(), module.main, case.argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Not sys.exit: the parent's clean-up is not the child's.
        os._exit(code)


def judge(case: Case, code: int, seconds: float, stderr: str) -> Ended:
    """Say what is wrong with the end of a case.

    Args:
      case: The case.
      code: Exit code, or minus the number of a signal.
      seconds: Seconds that it ran.
      stderr: Standard error.
    """
    lines = [line for line in stderr.splitlines() if line.strip()]
    problem = ""
    if "Traceback (most recent call last)" in stderr:
        problem = f"traceback: {lines[-1][:200]}"
    elif code == -signal.SIGKILL:
        problem = "hang"
    elif code == 2:
        if sum(line.startswith("error: ") for line in lines) != 1 or lines[-1][:7] != "error: ":
            problem = "not one line of error"
        elif case.output.exists():
            problem = "an output beside an error"
    elif code == 0:
        problem = _wrong_result(case)
    else:
        problem = f"exit {code}"
    return Ended(code, seconds, problem, stderr)


def _wrong_result(case: Case) -> str:
    """Say what is wrong with the result of a case that ended well."""
    if case.command != "prune" or "--help" in case.argv:
        return ""
    # An odd value of --output moves the result; relative ones begin where the child ran.
    output = case.output.parent / _given(case, "output")
    report = read_report(output)
    if not report:
        return "no report"
    right = case.output.parent / "right"
    if right.exists():
        same = [(d / "model.safetensors").read_bytes() for d in (right, output)]
        if same[0] != same[1]:
            return "other weights than from sound files"
    checks, said = report["checks"], report["load_back"]
    if not checks["topiary"]:
        return f"the result does not load: {said}"
    if checks["transformers"] or _came_in(case, output, said["transformers"]):
        return ""
    return f"transformers: {said['transformers']}"


def _given(case: Case, flag: str) -> str:
    """Return the value of a flag; the last one counts."""
    start = f"--{flag}="
    return [a.removeprefix(start) for a in case.argv if a.startswith(start)][-1]


def _came_in(case: Case, output: pathlib.Path, said: str) -> bool:
    """Return whether transformers fails by something that it refuses in the source as well.

    Args:
      case: The case.
      output: The result.
      said: What the check by transformers says.
    """
    from safetensors.numpy import load_file
    from transformers import AutoConfig

    from models.checkpoint.reader import read_config

    if not said.startswith("cannot load it"):
        # Logits that differ: only weights that no sound file has, where sums overflow, excuse them.
        tensors = [t for file in output.glob("*.safetensors") for t in load_file(file).values()]
        return max(float(np.abs(t).max()) for t in tensors if t.size) > HUGE
    model = pathlib.Path(_given(case, "model"))
    if not model.is_dir():
        return False
    # Read by us: an encoding that transformers refuses would hide what else it refuses.
    config = dict(read_config(model))
    try:
        AutoConfig.for_model(config.pop("model_type"), **config)
    except Exception as e:  # it raises of every kind
        return f"({type(e).__name__}: " in said
    return False


def wait_any(
    running: dict[int, tuple[Case, pathlib.Path, float]], limit: float
) -> list[tuple[Case, Ended]]:
    """Wait until a child ends, and kill those that run too long.

    Args:
      running: Case, file of standard error and start of each child; ended ones are removed.
      limit: Seconds after which a child hangs.
    """
    while True:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            case, said, begun = running.pop(child)
            stderr = said.read_text(errors="replace") if said.exists() else ""
            code = os.waitstatus_to_exitcode(status)
            return [(case, judge(case, code, time.monotonic() - begun, stderr))]
        for child, (_, _, begun) in running.items():
            if time.monotonic() - begun > limit:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
