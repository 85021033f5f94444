"""Run trials in this process, on a running Ray cluster, or as Slurm jobs."""

import contextlib
import importlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from calibration.step_cache import StepCache
from launch.flags import calls, termination
from launch.trials.trial import Job, Trial, Worker
from models.errors import InputError

RETRIES = 2  # times that a trial is run again after its host was lost
POLL = 1.0  # seconds between two looks at the workers or jobs
ACCELERATORS = ("TPU", "GPU", "CPU")  # resources that rank hosts, the most important first

# Trials as they end, each with the reason for its failure or None.
Ended = Generator[tuple[Trial, str | None], None, None]


class Execution(NamedTuple):
    """Way to run trials.

    Attributes:
      resources: Resources of one trial, as --resources names them.
      workers: Most workers or jobs at a time; 0 for as many as there is room for.
      cache: Results of steps in this process.
    """

    resources: Mapping[str, Any]
    workers: int
    cache: StepCache


Backend = Callable[[Sequence[Trial], Execution], Ended]


def parse_resources(text: str) -> dict[str, Any]:
    """Parse `CPU=4,TPU=1` or `partition=gpu,timeout_min=600`.

    Args:
      text: Value of --resources; may be empty.

    Returns:
      Values by name; numbers are int or float.

    Raises:
      InputError: An item is not `name=value`.
    """
    resources: dict[str, Any] = {}
    for item in calls.split_list(text) if text else ():
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise InputError(
                f"has an item {item!r}",
                "write name=value, such as CPU=4",
                field="resources",
                value=text,
            )
        resources[name] = _number_or_text(value)
    return resources


def _number_or_text(value: str) -> int | float | str:
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number


def _import(package: str, backend: str) -> Any:
    """Import an optional package, or raise InputError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"needs the package {package}",
            f"pip install {package}",
            field="backend",
            value=backend,
        ) from None


def run_here(trials: Sequence[Trial], execution: Execution) -> Ended:
    """Run trials in this process, one after the other.

    Args:
      trials: The trials.
      execution: The cache to use.

    Yields:
      Each trial as it ends, with the reason for its failure or None.

    Raises:
      InputError: Resources or workers were given.
    """
    if execution.resources or execution.workers:
        raise InputError(
            "--resources and --workers are for --backend=ray and --backend=slurm",
            "leave them out",
        )
    worker = Worker(cache=execution.cache)
    for trial in trials:
        yield trial, worker.run(trial)


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names, or to the one on this host."""
    if ray.is_initialized():  # the calling program has a connection, which must stay open
        yield
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as e:
        reason = (str(e).splitlines() or [""])[0]
        raise InputError(
            f"found no cluster ({reason})",
            "set RAY_ADDRESS, or start one with ray start --head",
            field="backend",
            value="ray",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _whole_host(hosts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the resources of the strongest host, so that a trial gets a host of its own."""
    best = max(hosts, key=lambda host: [host.get(kind, 0.0) for kind in ACCELERATORS])
    return {kind: best[kind] for kind in ACCELERATORS if best.get(kind)}


def _capacity(hosts: Sequence[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """Return how many trials with these resources the hosts can run at a time."""
    return sum(
        int(min(host.get(kind, 0.0) / amount for kind, amount in need.items())) for host in hosts
    )


def run_on_ray(trials: Sequence[Trial], execution: Execution) -> Ended:
    """Run trials on a Ray cluster; each free worker takes the next trial.

    If a worker's host is lost, the worker starts on another and resumes the trial from its
    journal.

    Args:
      trials: The trials.
      execution: Resources of a worker (empty: a whole host) and most workers (0: what fits).

    Yields:
      Each trial as it ends, with the reason for its failure or None.

    Raises:
      InputError: There is no ray, no cluster, or no host with these resources.
    """
    ray = _import("ray", "ray")
    invalid = {
        kind: amount
        for kind, amount in execution.resources.items()
        if not isinstance(amount, int | float) or amount <= 0
    }
    if invalid:
        raise InputError(
            "must be positive amounts for Ray",
            "write them as CPU=4",
            field="resources",
            value=",".join(f"{kind}={amount}" for kind, amount in invalid.items()),
        )
    with _cluster(ray):
        hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        need = dict(execution.resources) or _whole_host(hosts)
        count = min(len(trials), execution.workers or _capacity(hosts, need))
        if trials and not count:
            raise InputError(
                "fits no host of the cluster",
                "ask for less, or give --workers to wait for a host",
                field="resources",
                value=",".join(f"{kind}={amount:g}" for kind, amount in need.items()),
            )
        # Ray replaces our handler of SIGTERM by its own, and no handler may raise through it.
        with termination.termination_deferred() as stop:
            yield from _distribute(ray, trials, lambda: _start_actor(ray, need), count, stop)


def _start_actor(ray: Any, need: Mapping[str, float]) -> Any:
    """Start a worker with these resources on the cluster."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {"num_cpus": 0}
    options |= {named[kind]: amount for kind, amount in need.items() if kind in named}
    if "CPU" in need:
        # XLA starts one thread per processor of the host, unless NPROC gives their number.
        options["runtime_env"] = {"env_vars": {"NPROC": str(max(1, int(need["CPU"])))}}
    actor = ray.remote(Worker).options(
        **options,
        resources={kind: amount for kind, amount in need.items() if kind not in named},
        max_restarts=-1,
        max_task_retries=RETRIES,
    )
    return actor.remote(os.getcwd())


def _distribute(
    ray: Any, trials: Sequence[Trial], start: Callable[[], Any], count: int, stop: threading.Event
) -> Ended:
    """Give each of `count` actors the next trial when it is free, until all ended or `stop`."""
    waiting = iter(trials)
    running: dict[Any, tuple[Any, Trial]] = {}  # by reference of the result

    def give_next(actor: Any) -> None:
        trial = next(waiting, None)
        if trial:
            running[actor.run.remote(trial)] = actor, trial
        else:
            ray.kill(actor)

    try:
        for _ in range(count):
            give_next(start())
        while running:
            ended, _ = ray.wait(list(running), timeout=POLL)
            if stop.is_set():
                raise termination.Terminated
            for reference in ended:
                actor, trial = running.pop(reference)
                try:
                    error = ray.get(reference)
                except ray.exceptions.RayError as e:
                    reason = f"its worker was lost {1 + RETRIES} times: {type(e).__name__}"
                    error = trial.failed(reason, str(e))
                    # The actor may still be restarting, and calls to it would fail meanwhile.
                    ray.kill(actor)
                    actor = start()
                give_next(actor)
                yield trial, error
    finally:
        for actor, _ in running.values():
            ray.kill(actor)


def run_on_slurm(trials: Sequence[Trial], execution: Execution, cluster: str = "slurm") -> Ended:
    """Run trials as Slurm jobs; a preempted or timed-out job resumes in a new one.

    Args:
      trials: The trials.
      execution: Parameters of a job, and the number of jobs (0: one per trial). Each job runs
        consecutive trials.
      cluster: Name of submitit's executor.

    Yields:
      Each trial as its job ends, with the reason for its failure or None.

    Raises:
      InputError: There is no submitit or no sbatch, or submitit rejects a parameter.
    """
    # By default submitit configures logging on import, which closes other libraries' handlers.
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    submitit = _import("submitit", "slurm")
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise InputError(
            "found no sbatch",
            "start the sweep on a host that submits jobs, or choose another --backend",
            field="backend",
            value="slurm",
        )
    if not trials:
        return
    executor = submitit.AutoExecutor(folder=trials[0].sweep / "slurm", cluster=cluster)
    try:
        executor.update_parameters(name="topiary", **execution.resources)
    except (NameError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise InputError(f"is not accepted by submitit: {reason}", field="resources") from None
    parts = _consecutive_parts(trials, execution.workers or len(trials))
    submitted = executor.submit_array([Job(os.getcwd(), part) for part in parts])
    jobs = dict(zip(submitted, parts, strict=True))
    try:
        while jobs:
            for job in [job for job in jobs if job.done()]:
                yield from _results(job, jobs.pop(job))
            time.sleep(POLL if jobs else 0)
    finally:
        for job in jobs:
            job.cancel()


def _consecutive_parts(trials: Sequence[Trial], parts: int) -> list[list[Trial]]:
    """Split trials into at most `parts` lists of about equal length."""
    n, parts = len(trials), min(len(trials), parts)
    return [list(trials[k * n // parts : (k + 1) * n // parts]) for k in range(parts)]


def _results(job: Any, part: Sequence[Trial]) -> Ended:
    """Yield a job's trials with the reasons for their failures."""
    try:
        errors = job.result()
    except Exception as e:  # submitit has several types for a job that did not end well
        reason = f"job {job.job_id} ended without a result: {(str(e).splitlines() or [''])[0]}"
        errors = [None if trial.report() else trial.failed(reason, str(e)) for trial in part]
    yield from zip(part, errors, strict=True)


BACKENDS: dict[str, Backend] = {"local": run_here, "ray": run_on_ray, "slurm": run_on_slurm}
