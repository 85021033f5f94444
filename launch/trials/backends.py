"""Where trials run: in this process, on a Ray cluster that is there, or as jobs of Slurm."""

import contextlib
import importlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from calibration.journal import StepCache
from launch.flags import calls, cli
from launch.trials.trial import Job, Trial, Worker
from models.errors import InputError

RETRIES = 2  # of a trial whose host is lost
POLL = 1.0  # seconds between looks at what runs elsewhere
ACCELERATORS = ("TPU", "GPU", "CPU")  # what makes one host worth more than another

Ended = Generator[
    tuple[Trial, str | None], None, None
]  # trials as they end, with why if they failed


class Where(NamedTuple):
    """What trials get to run on: `resources` of each as --resources has them, most `workers` at a time (0: as many as there is room for),
    the `memory` of this process."""

    resources: Mapping[str, Any]
    workers: int
    memory: StepCache


Backend = Callable[[Sequence[Trial], Where], Ended]


def parse_resources(text: str) -> dict[str, Any]:
    """`CPU=4,TPU=1` or `partition=gpu,timeout_min=600` as a mapping; numbers are numbers. InputError for anything else."""
    found: dict[str, Any] = {}
    for item in calls.split_list(text) if text else ():
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise InputError(f"--resources={text}: {item!r} is not name=value, such as CPU=4")
        with contextlib.suppress(ValueError):
            found[name] = float(value)
            continue
        found[name] = value
    return {k: int(v) if isinstance(v, float) and v == int(v) else v for k, v in found.items()}


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        extra = {"ray": "ray", "submitit": "slurm"}[package]
        raise InputError(
            f"--backend={extra} needs {package}: pip install 'topiary[{extra}]'"
        ) from None


def local(trials: Sequence[Trial], where: Where) -> Ended:
    """One after the other, here."""
    if where.resources or where.workers:
        raise InputError(
            "--resources and --workers are for --backend=ray and --backend=slurm: leave them out"
        )
    worker = Worker(memory=where.memory)
    for trial in trials:
        yield trial, worker.run(trial)


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """A connection to the cluster that RAY_ADDRESS names or that runs on this host."""
    if ray.is_initialized():  # a program that calls this one: its connection stays
        yield
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as e:
        why = (str(e).splitlines() or [""])[0]
        raise InputError(
            f"--backend=ray found no cluster ({why}): set RAY_ADDRESS, or start one with ray start --head"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _whole_host(hosts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the strongest host has: a trial a host."""
    best = max(hosts, key=lambda host: [host.get(kind, 0.0) for kind in ACCELERATORS])
    return {kind: best[kind] for kind in ACCELERATORS if best.get(kind)}


def _fitting(hosts: Sequence[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How many times the cluster has what a trial needs."""
    return sum(
        int(min(host.get(kind, 0.0) / amount for kind, amount in need.items())) for host in hosts
    )


def on_ray(trials: Sequence[Trial], where: Where) -> Ended:
    """As many workers as the cluster has room for, each with its own memory, take the next trial whenever they are free.

    A worker whose host is lost comes back elsewhere, and its trial goes on there from its journal.
    """
    ray = _need("ray")
    if words := [
        f"{k}={v}" for k, v in where.resources.items() if not isinstance(v, int | float) or v <= 0
    ]:
        raise InputError(
            f"--resources={','.join(words)}: Ray's resources are amounts, such as CPU=4"
        )
    with _cluster(ray):
        hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        need = dict(where.resources) or _whole_host(hosts)
        count = min(len(trials), where.workers or _fitting(hosts, need))
        if trials and not count:
            raise InputError(
                f"--resources={_said(need)}: no host of the cluster has so much: ask for less, or say --workers to wait"
            )
        with (
            cli.termination_deferred() as stop
        ):  # also from the handler that Ray has put in the place of ours
            yield from _dealt(ray, trials, lambda: _actor(ray, need), count, stop)


def _said(need: Mapping[str, Any]) -> str:
    return ",".join(f"{kind}={amount:g}" for kind, amount in need.items())


def _actor(ray: Any, need: Mapping[str, float]) -> Any:
    special = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    more = {kind: amount for kind, amount in need.items() if kind not in special}
    options = {special[kind]: amount for kind, amount in need.items() if kind in special}
    # XLA starts as many threads as it sees processors, unless NPROC says how many it may have.
    threads = {"env_vars": {"NPROC": str(max(1, int(need["CPU"])))}} if "CPU" in need else {}
    actor = ray.remote(Worker).options(
        **{"num_cpus": 0, **options},
        resources=more,
        runtime_env=threads,
        max_restarts=-1,
        max_task_retries=RETRIES,
    )
    return actor.remote(os.getcwd())


def _dealt(
    ray: Any, trials: Sequence[Trial], new: Callable[[], Any], count: int, stop: threading.Event
) -> Ended:
    """Deal trials out to `count` actors, the next one to whoever is free, until there are none or `stop` is set."""
    waiting, running = iter(trials), {}

    def deal(actor: Any) -> None:
        if trial := next(waiting, None):
            running[actor.run.remote(trial)] = actor, trial
        else:
            ray.kill(actor)

    try:
        for _ in range(count):
            deal(new())
        while running:
            ended, _ = ray.wait(list(running), timeout=POLL)
            if stop.is_set():
                raise cli.Terminated
            for done in ended:
                actor, trial = running.pop(done)
                try:
                    error = ray.get(done)
                except ray.exceptions.RayError as e:
                    error = trial.failed(
                        f"its worker was lost {1 + RETRIES} times: {type(e).__name__}", str(e)
                    )
                    ray.kill(
                        actor
                    )  # it may still be coming back, and what it is asked meanwhile fails
                    actor = new()
                deal(actor)
                yield trial, error
    finally:
        for actor, _ in running.values():
            ray.kill(actor)


def on_slurm(trials: Sequence[Trial], where: Where, cluster: str = "slurm") -> Ended:
    """As many jobs as `workers` (0: one a trial), each with consecutive trials; jobs that are preempted or out of time go on in a new one.

    Args:
      cluster: submitit's name for where jobs go.
    """
    os.environ.setdefault(
        "SUBMITIT_LOG_LEVEL", "NOCONFIG"
    )  # or importing it closes the handlers that other libraries log to
    submitit = _need("submitit")
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise InputError(
            "--backend=slurm found no sbatch: start the sweep where jobs are submitted, or choose another --backend"
        )
    if not trials:
        return
    executor = submitit.AutoExecutor(folder=trials[0].sweep / "slurm", cluster=cluster)
    try:
        executor.update_parameters(name="topiary", **where.resources)
    except (NameError, TypeError, ValueError) as e:
        raise InputError(f"--resources: submitit says {' '.join(str(e).split())}") from None
    count = min(len(trials), where.workers or len(trials))
    parts = [
        list(trials[k * len(trials) // count : (k + 1) * len(trials) // count])
        for k in range(count)
    ]
    jobs = dict(
        zip(executor.submit_array([Job(os.getcwd(), part) for part in parts]), parts, strict=True)
    )
    try:
        while jobs:
            for job in [job for job in jobs if job.done()]:
                yield from _ended(job, jobs.pop(job))
            time.sleep(POLL if jobs else 0)
    finally:
        for job in jobs:
            job.cancel()


def _ended(job: Any, part: Sequence[Trial]) -> Ended:
    """What became of a job's trials."""
    try:
        errors = job.result()
    except Exception as e:  # the job's own end, in whatever type submitit gives it
        lost = f"job {job.job_id} ended without a result: {(str(e).splitlines() or [''])[0]}"
        errors = [None if trial.report() else trial.failed(lost, str(e)) for trial in part]
    yield from zip(part, errors, strict=True)


BACKENDS: dict[str, Backend] = {"local": local, "ray": on_ray, "slurm": on_slurm}
