"""Trials elsewhere: on a real Ray cluster of this host, through submitit's local queue, and what is said where neither is there."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from calibration.step_cache import StepCache
from launch import sweep
from launch.flags.cli import Terminated, run, termination_deferred
from launch.run import export
from launch.trials import backends
from launch.trials import trial as trials
from launch.trials.backends import Where
from launch.trials.trial import Job, Trial
from models.checkpoint.writer import save
from models.errors import InputError
from models.init import init_model

ROOT = Path(__file__).parents[3]
LLAMA = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    save(root / "llama", init_model(LLAMA, jax.random.key(1)), LLAMA, root)
    rng = np.random.default_rng(0)
    np.save(root / "calib.npy", rng.integers(0, 64, (4, 16), np.int32))
    np.save(root / "eval.npy", rng.integers(0, 64, (2, 16), np.int32))
    return root


@pytest.fixture(autouse=True)
def _no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and nothing here is about it. (Workers ask it.)"""
    monkeypatch.setattr(export, "_by_transformers", lambda *_: export.Check(True, "not asked"))


def argv(inputs: Path, output: Path, *more: str) -> list[str]:
    data = [
        f"--calibration={inputs / 'calib.npy'}",
        f"--eval_data={inputs / 'eval.npy'}",
        "--calibration_batch=2",
    ]
    return [
        f"--model={inputs / 'llama'}",
        *data,
        "--mesh=data=1",
        f"--output={output}",
        "--methods=magnitude",
        *more,
    ]


def made(inputs: Path, output: Path, *more: str) -> list[Trial]:
    """The trials of a grid."""
    output.mkdir()
    return sweep.grid(sweep.options().parse(argv(inputs, output, *more)), output)


def where(workers: int = 0, **resources: Any) -> Where:
    return Where(resources, workers, StepCache())


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


def test_a_sweep_on_ray(
    inputs: Path, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two trials at a time; one cannot be written, and is, when the same command is given again."""
    out = tmp_path / "out"
    args = argv(inputs, out, "--sparsities=0.2,0.4", "--backend=ray", "--resources=CPU=1")
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


def test_a_trial_that_ends_its_worker_is_a_failure_and_the_rest_goes_on(
    inputs: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.cloudpickle

    monkeypatch.setattr(backends, "RETRIES", 0)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    first, second = made(inputs, tmp_path / "out", "--sparsities=0.2,0.4")
    found = dict(
        backends.on_ray([Fatal(first.sweep, first.config), second], where(workers=1, CPU=1))
    )
    assert list(found.values())[1] is None and second.report()
    (error, _) = found.values()
    assert "its worker was lost" in str(error) and first.log.read_text().startswith(str(error))


def test_ray_says_what_the_cluster_lacks(inputs: Path, tmp_path: Path, cluster: str) -> None:
    (trial,) = made(inputs, tmp_path / "out", "--sparsities=0.2")
    for resources, said in [
        ({"CPU": 64}, "no host of the cluster"),
        ({"TPU": 4}, "no host"),
        ({"CPU": "many"}, "are amounts"),
    ]:
        with pytest.raises(InputError, match=said):
            list(backends.on_ray([trial], where(**resources)))


def test_a_trial_takes_a_whole_host_of_the_strongest_kind() -> None:
    hosts = [
        {"CPU": 64.0},
        {"CPU": 8.0, "TPU": 4.0, "node:1": 1.0},
        {"CPU": 8.0, "TPU": 4.0},
        {"CPU": 96.0, "GPU": 8.0},
    ]
    need = backends._whole_host(hosts)
    assert need == {"TPU": 4.0, "CPU": 8.0} and backends._fitting(hosts, need) == 2
    assert (
        backends._fitting(hosts, {"CPU": 8}) == 8 + 1 + 1 + 12
        and backends._fitting(hosts, {"GPU": 2, "CPU": 1}) == 4
    )


def test_sigterm_waits_where_it_may_not_raise() -> None:
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


def test_resources_are_names_with_amounts_or_words() -> None:
    assert backends.parse_resources("CPU=4, TPU-v4=0.5,partition=gpu") == {
        "CPU": 4,
        "TPU-v4": 0.5,
        "partition": "gpu",
    }
    assert backends.parse_resources("") == {}


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_package_that_is_not_there_is_named(
    backend: str,
    package: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert call(argv(inputs, tmp_path / "out", "--sparsities=0.2", f"--backend={backend}")) == 2
    assert f"pip install 'topiary[{backend}]'" in capsys.readouterr().err


def test_no_cluster_and_no_queue_are_said(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    def nothing(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", nothing)
    assert call(argv(inputs, tmp_path / "out", "--sparsities=0.2", "--backend=ray")) == 2
    assert "set RAY_ADDRESS, or start one" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert call(argv(inputs, tmp_path / "out", "--sparsities=0.2", "--backend=slurm")) == 2
    assert "no sbatch" in capsys.readouterr().err


def test_jobs_of_consecutive_trials(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through submitit's queue of this host: two jobs for three trials, one of which fails."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(backends, "POLL", 0.2)
    first, second, third = made(inputs, tmp_path / "out", "--sparsities=0.2,0.4,0.6")
    stone = Path(str(second.config.output)) / "stone"
    stone.parent.mkdir(parents=True)
    stone.touch()
    found = dict(
        backends.on_slurm([first, second, third], where(workers=2, timeout_min=10), cluster="local")
    )
    assert (
        found[first] is None
        and found[third] is None
        and "not an earlier result" in str(found[second])
    )
    assert first.report() and third.report() and second.log.is_file()
    assert len(list((tmp_path / "out" / "slurm").glob("*_submitted.pkl"))) == 2


def test_a_job_that_ends_without_a_result_is_the_failure_of_what_it_left(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = made(inputs, tmp_path / "out", "--sparsities=0.2,0.4")
    assert trials.Worker().run(first) is None

    class Gone:
        job_id = "7"

        def result(self) -> None:
            raise RuntimeError("out of memory\nand more")

    assert dict(backends._ended(Gone(), [first, second])) == {
        first: None,
        second: "job 7 ended without a result: out of memory",
    }
    assert "and more" in second.log.read_text()


def test_what_slurm_parameters_submitit_does_not_know(inputs: Path, tmp_path: Path) -> None:
    (trial,) = made(inputs, tmp_path / "out", "--sparsities=0.2")
    with pytest.raises(InputError, match="zebra"):
        list(backends.on_slurm([trial], where(zebra=1), cluster="local"))


def test_a_preempted_job_is_submitted_as_it_was(inputs: Path, tmp_path: Path) -> None:
    part = made(inputs, tmp_path / "out", "--sparsities=0.2,0.4")
    again = Job(".", part).checkpoint().function
    assert isinstance(again, Job) and again.trials == part
