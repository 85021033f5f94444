"""One trial of a sweep, a run of `launch.prune`, and a worker that runs several in one process."""

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

# Trials after which compiled programs are dropped: a process that keeps thousands of them runs
# out of memory maps.
CLEAR_EVERY = 16
LONGEST_ARGUMENTS = 48  # most characters of a call's arguments in a directory's name
# Settings that may differ from those of a finished trial: the name of its directory has the
# sparsity, and the others do not affect the result.
NOT_COMPARED = ("output", "resume", "sparsity", "track")


def label(text: str) -> str:
    """Return a call as part of a file name, unique by a digest of its arguments.

    Args:
      text: A call such as `flap(metric="WIFN")`.
    """
    name, arguments = calls.parse_call(text)
    if not arguments:
        return name
    readable = "_".join(f"{k}={v}" for k, v in sorted(arguments.items()))
    readable = re.sub(r"[^A-Za-z0-9=_.-]+", "-", readable)[:LONGEST_ARGUMENTS]
    digest = hashlib.sha256(repr(sorted(arguments.items())).encode()).hexdigest()[:6]
    return f"{name}_{readable}_{digest}"


def error_line(error: Exception) -> str:
    """Return an exception as one line, settings named as flags of `launch.prune`."""
    if isinstance(error, InputError):
        return " ".join(error.message(prune.options().shown).split())
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trial in the directory of its sweep.

    The directory's name follows from the settings that trials differ in, so a trial has the same
    directory in every sweep.

    Attributes:
      sweep: Directory of the sweep.
      config: Settings of the run.
    """

    sweep: pathlib.Path
    config: RunConfig

    @staticmethod
    def of(sweep: pathlib.Path, config: RunConfig) -> "Trial":
        """Return the trial of a configuration, with its own output directory.

        Args:
          sweep: Directory of the sweep.
          config: Settings of the run; `output` is replaced.
        """
        name = Trial(sweep, config).name
        return Trial(sweep, dataclasses.replace(config, output=str(sweep / "trials" / name)))

    @property
    def name(self) -> str:
        """Return the trial's name: method, sparsity or target, allocation, refinement, seed."""
        c = self.config
        parts = [label(c.method)]
        if c.sparsity is not None:
            parts.append(repr(c.sparsity))
        if c.target:
            parts.append(re.sub(r"[^A-Za-z0-9=.]+", "_", c.target))
        if c.allocation != "uniform":
            parts.append(label(c.allocation))
        if c.refine != "none":
            parts.append(label(c.refine))
        return "-".join([*parts, f"seed{c.seed}"])

    @property
    def log(self) -> pathlib.Path:
        """Return the file that describes the trial's failure."""
        return self.sweep / "failures" / f"{self.name}.log"

    def report(self) -> dict[str, Any] | None:
        """Read the trial's report.

        Returns:
          Content of pruning_report.json; None if the trial is not finished.

        Raises:
          InputError: The report cannot be read, or is of a run with other settings.
        """
        path = pathlib.Path(str(self.config.output)) / export.REPORT
        if not path.is_file():
            return None
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            before, now = report["settings"], dataclasses.asdict(self.config)
        except (ValueError, KeyError, TypeError, OSError):
            raise InputError(
                f"{path} cannot be read", f"remove {path.parent} to run the trial again"
            ) from None
        for name in now:
            if name not in NOT_COMPARED and before.get(name) != now[name]:
                values = f"{json.dumps(before.get(name))}, now {json.dumps(now[name])}"
                raise InputError(
                    f"{path.parent} holds a trial with another --{name} ({values})",
                    "choose another --output, or remove it",
                )
        return report

    def failed(self, error: str, details: str = "") -> str:
        """Record a failure in the trial's log and return the error.

        Args:
          error: Reason, one line.
          details: More about it, such as a traceback.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.log, f"{error}\n\n{prune.command(self.config)}\n\n{details}".encode())
        return error


class Worker:
    """Runs trials in this process, which share steps that do not depend on what they differ in.

    Args:
      directory: Working directory, from which relative paths are meant.
      cache: Results of steps; a new cache by default.
    """

    def __init__(self, directory: str = ".", cache: StepCache | None = None):
        os.chdir(directory)
        self._cache = cache or StepCache()
        self._trials = 0

    def run(self, trial: Trial) -> str | None:
        """Run a trial unless it is finished.

        Args:
          trial: The trial.

        Returns:
          None, or the reason for its failure in one line.
        """
        try:
            if trial.report() is None:
                prune.prune(trial.config, self._cache)
        except Exception as e:  # a failure of any kind must not end the sweep
            return trial.failed(error_line(e), traceback.format_exc())
        finally:
            self._trials += 1
            if self._trials % CLEAR_EVERY == 0:
                jax.clear_caches()
        trial.log.unlink(missing_ok=True)
        return None


class Job:
    """Trials that one job of a queue runs; the queue may stop the job and start it again.

    Args:
      directory: Working directory, from which relative paths are meant.
      trials: The trials.
    """

    def __init__(self, directory: str, trials: Sequence[Trial]):
        self.directory, self.trials = directory, trials

    def __call__(self) -> list[str | None]:
        """Run the trials that are not finished and return `Worker.run`'s result for each."""
        worker = Worker(self.directory)
        return [worker.run(trial) for trial in self.trials]

    def checkpoint(self) -> Any:
        """Return the same job, for submitit to submit after a preemption or a timeout."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
