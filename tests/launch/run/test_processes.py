"""One device, eight devices, and two processes of four devices each leave the same model."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from launch import prune
from launch.flags.cli import run
from models.checkpoint.writer import save
from models.init import init_model
from reference.processes import xla_flags
from reference.prune_runs import weights

pytestmark = pytest.mark.slow

TESTS = pathlib.Path(__file__).parents[2]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}
RUNS = {
    "magnitude": ["--method=magnitude", "--sparsity=0.5", "--allocation=alpha"],
    "wanda": ["--method=wanda", "--sparsity=0.5", "--allocation=owl", "--refine=dsnot"],
    "multiflow": ["--method=multiflow", "--sparsity=0.5"],
    "sparsegpt": [
        "--method=sparsegpt",
        "--sparsity=0.5",
        "--allocation=neuroal(samples=8)",
        "--output_format=orbax",
    ],
    "sparsellm": ["--method=sparsellm(iterations=1)", "--sparsity=0.5"],
    "llmrank": ['--method=llmrank(repair="refit")', "--sparsity=0.5"],
    "flap": ["--method=flap", "--sparsity=0.3"],
    "wanda_sp": ['--method=wanda_sp(repair="bias")', "--sparsity=0.4"],
    "magnitude_sp": ["--method=magnitude_sp", "--sparsity=0.4"],
    "sleb": ["--method=sleb(blocks=2)"],
    "recovered": [
        "--method=wanda",
        "--sparsity=0.5",
        "--recover=blocks(steps=4,batch=4,lr=1e-3)",
    ],
    "distilled": [
        "--method=wanda",
        "--sparsity=0.5",
        "--recover=distill(steps=3,batch=4,accumulate=2,top_k=5,lr=1e-3)",
    ],
    "again": ["--method=wanda", "--sparsity=0.5"],
    "rows": ["--method=wanda", "--sparsity=0.5"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small model with tokens."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save(folder, init_model(CONFIG, jax.random.key(0)), CONFIG, folder)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 64, (16, 24)))
    return folder


def started(
    devices: int, *arguments: str, main: Sequence[str] = (str(TESTS / "reference/runs.py"),)
) -> "subprocess.Popen[str]":
    """Start a process with a number of CPU devices."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))}
    flags = {"XLA_FLAGS": xla_flags(devices)}
    # Processes that share JAX's compilation cache can load one program and compile another, and
    # then wait for each other for ever in a collective of the CPU backend.
    flags |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, *main, *arguments]
    return subprocess.Popen(command, env=os.environ | paths | flags, **options)


def port() -> str:
    """Return a free port of this host."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


@pytest.fixture(scope="module")
def outputs(
    model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pathlib.Path]:
    """Outputs of the same runs on one device, on eight, and in two processes with four each."""
    mesh = {
        name: [
            *flags,
            f"--mesh=data={1 if name == 'rows' else 4},model={8 if name == 'rows' else 2}",
        ]
        for name, flags in RUNS.items()
    }
    where = {name: tmp_path_factory.mktemp(name) for name in ("one", "eight", "processes")}
    one = started(1, str(model), str(where["one"]), json.dumps(RUNS))
    eight = started(8, str(model), str(where["eight"]), json.dumps(mesh))
    address = port()
    two = [
        started(4, str(model), str(where["processes"]), json.dumps(mesh), address, "2", str(rank))
        for rank in (0, 1)
    ]
    said = [p.communicate(timeout=900)[0] for p in (one, eight, *two)]
    assert [p.returncode for p in (one, eight, *two)] == [0, 0, 0, 0], "\n".join(said)
    assert "the result will load as" in said[2] and "the result will load as" not in said[3], said[
        3
    ]  # the second process says nothing
    for text in said[2:]:
        assert "rows read in part: [0.5]" in text and "wanda read in part: []" in text, text
    return where


def test_an_interrupted_run_resumes_in_several_processes(outputs: dict[str, pathlib.Path]) -> None:
    for where in outputs.values():
        said = {
            name: (where / name / "pruning_report.json").read_text() for name in ("again", "rows")
        }
        assert (
            "the run was interrupted" in said["again"]
            and "the run was interrupted" not in said["rows"]
        )


def test_processes_that_differ_are_refused(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    address, tokens = port(), model / "tokens.npy"
    common = [
        f"--model={model}",
        f"--calibration={tokens}",
        f"--eval_data={tokens}",
        f"--output={tmp_path / 'out'}",
    ]
    common += ["--method=magnitude", f"--coordinator={address}", "--processes=2"]
    two = [
        started(4, *common, f"--process={k}", f"--sparsity=0.{5 + k}", main=["-m", "launch.prune"])
        for k in (0, 1)
    ]
    said = [p.communicate(timeout=300)[0] for p in two]
    assert [p.returncode for p in two] == [2, 2], "\n".join(said)
    for text in said:
        assert "error: process 1 differs from process 0 in what it was given" in text
    assert "given (--sparsity)" in said[1] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--processes=2"],
        ["--process=1"],
        ["--coordinator=localhost:1", "--processes=2", "--process=2"],
    ],
)
def test_process_flags_that_do_not_go_together_are_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(prune.options(), prune.main, ["--model=embedded:tiny-llama", "--sparsity=0.5", *flags])
        == 2
    )
    assert "--coordinator" in capsys.readouterr().err


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("where", ["eight", "processes"])
def test_devices_and_processes_leave_the_same_model(
    outputs: dict[str, pathlib.Path], where: str, name: str
) -> None:
    one, shared = (outputs[w] / name for w in ("one", where))
    a, b = weights(one), weights(shared)
    assert a.keys() == b.keys()
    for key, x in a.items():
        assert np.array_equal(x == 0, b[key] == 0), key
        np.testing.assert_allclose(b[key], x, atol=1e-3, err_msg=key)
    alone, together = (json.loads((f / "pruning_report.json").read_text()) for f in (one, shared))
    for data, found in alone["perplexity"].items():
        for kind in {"dense", "pruned", "recovered"} & found.keys():
            assert together["perplexity"][data][kind] == pytest.approx(found[kind], rel=1e-5), kind
        assert found.get("recovered") != found["pruned"]  # else nothing was trained
        agreement, other = (report["agreement"][data] for report in (alone, together))
        assert agreement["kl"] > 0 and agreement.keys() >= {"top1", "greedy"}
        assert other.pop("recovered", {}) == pytest.approx(agreement.pop("recovered", {}), rel=1e-4)
        assert other == pytest.approx(agreement, rel=1e-4)
