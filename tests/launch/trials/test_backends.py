"""Trials run on a Ray cluster of this host and through submitit's local queue."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calibration.step_cache import StepCache
from launch import sweep
from launch.flags.cli import run
from launch.flags.termination import Terminated, termination_deferred
from launch.run import export
from launch.trials import backends
from launch.trials import trial as trials
from launch.trials.backends import Execution
from launch.trials.trial import Job, Trial
from models.errors import InputError

pytestmark = pytest.mark.slow

for package in ("ray", "submitit"):
    pytest.importorskip(package, reason="needs the slowtest extra")

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _skip_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the check with transformers, which takes seconds; other processes still do it."""
    monkeypatch.setattr(export, "_by_transformers", lambda *_: export.Check(True, "not asked"))


def argv(trial_inputs: Path, output: Path, *more: str) -> list[str]:
    data = [
        f"--calibration={trial_inputs / 'calib.npy'}",
        f"--eval_data={trial_inputs / 'eval.npy'}",
        "--calibration_batch=2",
    ]
    return [
        f"--model={trial_inputs / 'llama'}",
        *data,
        "--mesh=data=1",
        f"--output={output}",
        "--methods=magnitude",
        *more,
    ]


def made(trial_inputs: Path, output: Path, *more: str) -> list[Trial]:
    """The trials of a grid."""
    output.mkdir()
    return sweep.grid(sweep.options().parse(argv(trial_inputs, output, *more)), output)


def execution(workers: int = 0, **resources: Any) -> Execution:
    return Execution(resources, workers, StepCache())


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray cluster of this host with two processors; RAY_ADDRESS names it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [
        "--head",
        f"--port={address.split(':')[1]}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--block",
    ]
    command = [
        sys.executable,
        "-c",
        "from ray.scripts.scripts import main; main()",
        "start",
        *flags,
        f"--object-store-memory={80 << 20}",
    ]
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as head:
        try:
            assert head.stdout and any("Ray runtime started" in line for line in head.stdout)
            with pytest.MonkeyPatch.context() as m:
                m.setenv("RAY_ADDRESS", address)
                yield address
        finally:
            head.terminate()


def call(args: list[str]) -> int:
    return run(sweep.options(), sweep.main, args)


def test_a_sweep_on_ray_runs_failed_trials_again(
    trial_inputs: Path, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two trials at a time; one cannot be written, and is, when the same command is given again."""
    out = tmp_path / "out"
    args = argv(trial_inputs, out, "--sparsities=0.2,0.4", "--backend=ray", "--resources=CPU=1")
    stone = out / "trials" / "magnitude-0.4-seed0" / "stone"
    stone.parent.mkdir(parents=True)
    stone.touch()
    (out / "sweep.json").touch()
    assert call(args) == 1
    states = {
        row["trial"]: row["state"] for row in json.loads((out / "sweep.json").read_text())["trials"]
    }
    assert states == {"magnitude-0.2-seed0": "finished", "magnitude-0.4-seed0": "failed"}
    assert "not an earlier result" in capsys.readouterr().out
    stone.unlink()
    assert call(args) == 0
    got = capsys.readouterr()
    assert (
        "1 of 2 trials are finished, 1 to go" in got.err
        and "2 of 2: magnitude-0.4-seed0: perplexity" in got.err
    )
    report = json.loads((stone.parent / "pruning_report.json").read_text())
    assert report["sparsity"]["prunable"] == pytest.approx(0.4, abs=0.01)


class Fatal(Trial):
    """A trial that takes its process with it."""

    def report(self) -> None:
        if os.environ.get("NPROC"):  # a worker's
            os._exit(1)


def test_a_trial_that_kills_its_worker_fails_and_the_others_run(
    trial_inputs: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.cloudpickle

    monkeypatch.setattr(backends, "RETRIES", 0)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    first, second = made(trial_inputs, tmp_path / "out", "--sparsities=0.2,0.4")
    found = dict(
        backends.run_on_ray([Fatal(first.sweep, first.config), second], execution(workers=1, CPU=1))
    )
    assert list(found.values())[1] is None and second.report()
    (error, _) = found.values()
    assert "its worker was lost" in str(error) and first.log.read_text().startswith(str(error))


def test_resources_that_no_host_has_are_an_error(
    trial_inputs: Path, tmp_path: Path, cluster: str
) -> None:
    (trial,) = made(trial_inputs, tmp_path / "out", "--sparsities=0.2")
    for resources, said in [
        ({"CPU": 64}, "no host of the cluster"),
        ({"TPU": 4}, "no host"),
        ({"CPU": "many"}, "must be positive amounts"),
    ]:
        with pytest.raises(InputError, match=said):
            list(backends.run_on_ray([trial], execution(**resources)))


def test_a_trial_takes_a_whole_host_of_the_strongest_kind() -> None:
    hosts = [
        {"CPU": 64.0},
        {"CPU": 8.0, "TPU": 4.0, "node:1": 1.0},
        {"CPU": 8.0, "TPU": 4.0},
        {"CPU": 96.0, "GPU": 8.0},
    ]
    need = backends._whole_host(hosts)
    assert need == {"TPU": 4.0, "CPU": 8.0} and backends._capacity(hosts, need) == 2
    assert (
        backends._capacity(hosts, {"CPU": 8}) == 8 + 1 + 1 + 12
        and backends._capacity(hosts, {"GPU": 2, "CPU": 1}) == 4
    )


def test_a_deferred_sigterm_sets_an_event() -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    try:
        with termination_deferred() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wait(5)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_resources_are_names_with_numbers_or_texts() -> None:
    assert backends.parse_resources("CPU=4, TPU-v4=0.5,partition=gpu") == {
        "CPU": 4,
        "TPU-v4": 0.5,
        "partition": "gpu",
    }
    assert backends.parse_resources("") == {}


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named(
    backend: str,
    package: str,
    trial_inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert (
        call(argv(trial_inputs, tmp_path / "out", "--sparsities=0.2", f"--backend={backend}")) == 2
    )
    assert f"pip install {package}" in capsys.readouterr().err


def test_a_missing_cluster_or_queue_is_an_error(
    trial_inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    def nothing(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", nothing)
    assert call(argv(trial_inputs, tmp_path / "out", "--sparsities=0.2", "--backend=ray")) == 2
    assert "set RAY_ADDRESS, or start one" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert call(argv(trial_inputs, tmp_path / "out", "--sparsities=0.2", "--backend=slurm")) == 2
    assert "no sbatch" in capsys.readouterr().err


def test_jobs_run_consecutive_trials_and_report_failures(
    trial_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs run three trials through submitit's local queue; one trial fails."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(backends, "POLL", 0.2)
    first, second, third = made(trial_inputs, tmp_path / "out", "--sparsities=0.2,0.4,0.6")
    stone = Path(str(second.config.output)) / "stone"
    stone.parent.mkdir(parents=True)
    stone.touch()
    found = dict(
        backends.run_on_slurm(
            [first, second, third], execution(workers=2, timeout_min=10), cluster="local"
        )
    )
    assert (
        found[first] is None
        and found[third] is None
        and "not an earlier result" in str(found[second])
    )
    assert first.report() and third.report() and second.log.is_file()
    assert len(list((tmp_path / "out" / "slurm").glob("*_submitted.pkl"))) == 2


def test_a_job_without_a_result_fails_its_unfinished_trials(
    trial_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = made(trial_inputs, tmp_path / "out", "--sparsities=0.2,0.4")
    assert trials.Worker().run(first) is None

    class Gone:
        job_id = "7"

        def result(self) -> None:
            raise RuntimeError("out of memory\nand more")

    assert dict(backends._results(Gone(), [first, second])) == {
        first: None,
        second: "job 7 ended without a result: out of memory",
    }
    assert "and more" in second.log.read_text()


def test_an_unknown_slurm_parameter_is_an_error(trial_inputs: Path, tmp_path: Path) -> None:
    (trial,) = made(trial_inputs, tmp_path / "out", "--sparsities=0.2")
    with pytest.raises(InputError, match="zebra"):
        list(backends.run_on_slurm([trial], execution(zebra=1), cluster="local"))


def test_a_preempted_job_is_submitted_again_unchanged(trial_inputs: Path, tmp_path: Path) -> None:
    part = made(trial_inputs, tmp_path / "out", "--sparsities=0.2,0.4")
    again = Job(".", part).checkpoint().function
    assert isinstance(again, Job) and again.trials == part
