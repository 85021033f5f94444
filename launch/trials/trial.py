"""One trial of a sweep, which is a run of `launch.prune`; and what runs several of them in one process."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import traceback
from collections.abc import Sequence
from typing import Any

import jax

from calibration.journal import write_durably
from calibration.step_cache import StepCache
from launch import prune
from launch.flags import calls
from launch.run import export
from launch.run.job import RunConfig
from models.errors import InputError

FORGET = 16  # trials after which compiled programs are dropped: a process that keeps thousands runs out of memory maps
LONGEST = 48  # characters of a call's arguments in a name
ELSEWHERE = (
    "output",
    "resume",
    "sparsity",
)  # settings that are no trial's own, or stand in its name


def label(text: str) -> str:
    """A call as part of a file's name: its arguments readable, and where there are any a digest, so that no two calls look alike."""
    name, arguments = calls.parse_call(text)
    if not arguments:
        return name
    said = "_".join(f"{k}={v}" for k, v in sorted(arguments.items()))
    digest = hashlib.sha256(repr(sorted(arguments.items())).encode()).hexdigest()[:6]
    return f"{name}_{re.sub(r'[^A-Za-z0-9=_.-]+', '-', said)[:LONGEST]}_{digest}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trial in the directory of its sweep.

    `config` is all that it is: the directory's name follows from what trials differ in, so the same trial has the same one in every sweep.
    """

    sweep: pathlib.Path
    config: RunConfig

    @staticmethod
    def of(sweep: pathlib.Path, config: RunConfig) -> "Trial":
        """The trial of a configuration, whose output becomes the trial's own directory."""
        trial = Trial(sweep, config)
        return Trial(sweep, dataclasses.replace(config, output=str(sweep / "trials" / trial.name)))

    @property
    def name(self) -> str:
        """Method, sparsity, allocation unless uniform, refinement if there is one, seed."""
        c = self.config
        sparsity = [] if c.sparsity is None else [repr(c.sparsity)]
        allocation = [] if c.allocation == "uniform" else [label(c.allocation)]
        refine = [] if c.refine == "none" else [label(c.refine)]
        return "-".join([label(c.method), *sparsity, *allocation, *refine, f"seed{c.seed}"])

    @property
    def log(self) -> pathlib.Path:
        """Where its failure is told."""
        return self.sweep / "failures" / f"{self.name}.log"

    def report(self) -> dict[str, Any] | None:
        """Its report if it is finished; InputError if that was run with other settings than these, or cannot be read."""
        path = pathlib.Path(str(self.config.output)) / export.REPORT
        if not path.is_file():
            return None
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            was, now = report["settings"], dataclasses.asdict(self.config)
        except (ValueError, KeyError, TypeError, OSError):
            raise InputError(
                f"{path} cannot be read: remove {path.parent}, and the trial is run again"
            ) from None
        for name in now:
            if name not in ELSEWHERE and was.get(name) != now[name]:
                said = f"{json.dumps(was.get(name))}, now {json.dumps(now[name])}"
                raise InputError(
                    f"{path.parent} is a trial with another --{name} ({said}): choose another --output, or remove it"
                )
        return report

    def failed(self, error: str, details: str = "") -> str:
        """Record a failure, with its command and details such as a traceback; returns the error."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.log, f"{error}\n\n{prune.command(self.config)}\n\n{details}".encode())
        return error


class Worker:
    """Runs trials one after the other in this process, which remembers what they have in common.

    Args:
      directory: that relative names of files are meant from.
    """

    def __init__(self, directory: str = ".", memory: StepCache | None = None):
        os.chdir(directory)
        self._memory, self._run = memory or StepCache(), 0

    def run(self, trial: Trial) -> str | None:
        """Run a trial, unless it is finished; None, or why it failed, in a line. Whatever an ordinary exception can tell is a failure."""
        try:
            if trial.report() is None:
                prune.prune(trial.config, self._memory)
        except Exception as e:
            said = (
                " ".join(str(e).split())
                if isinstance(e, InputError)
                else f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
            )
            return trial.failed(said, traceback.format_exc())
        finally:
            self._run += 1
            if self._run % FORGET == 0:
                jax.clear_caches()
        trial.log.unlink(missing_ok=True)
        return None


class Job:
    """Trials that one job runs, for a queue that may stop the job and start it again."""

    def __init__(self, directory: str, trials: Sequence[Trial]):
        self.directory, self.trials = directory, trials

    def __call__(self) -> list[str | None]:
        """Run those that are not finished; what `Worker.run` says of each."""
        worker = Worker(self.directory)
        return [worker.run(trial) for trial in self.trials]

    def checkpoint(self) -> Any:
        """What submitit starts when the job was preempted, or out of time: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
