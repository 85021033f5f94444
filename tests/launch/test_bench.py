"""`launch.bench` measures calibration and whole pruning runs, and writes its results."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import bench
from launch.flags.cli import run
from models.checkpoint.writer import save
from models.init import init_model

pytestmark = pytest.mark.slow

CONFIG = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    architectures=["LlamaForCausalLM"],
)


@pytest.mark.parametrize("torch", [False, True])
def test_the_command_writes_its_results(
    torch: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch:
        pytest.importorskip("torch")
    save(tmp_path / "model", init_model(CONFIG, jax.random.key(0)), CONFIG, tmp_path)
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, 64, (4, 16), np.int32))
    argv = [
        f"--model={tmp_path / 'model'}",
        f"--calibration={tmp_path / 't.npy'}",
        "--runs=2",
        f"--json={tmp_path / 'b.json'}",
    ]
    assert run(bench.options(), bench.main, [*argv, f"--{'' if torch else 'no'}torch"]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert set(result["figures"]) == {
        "Wanda statistics",
        "LLMRank statistics",
        *(["PyTorch forward"] if torch else []),
    }
    assert all(len(f["seconds"]) == 2 and f["ratio"] > 0 for f in result["figures"].values())
    assert result["protocol"]["calibration"]["samples"] == 4
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "torch", "programs"),
    [
        ("sparsegpt", True, ["SparseGPT", "PyTorch"]),
        ("admm", True, ["ADMM", "own targets", "SparseGPT", "PyTorch"]),
        (
            "sparsellm",
            True,
            ["SparseLLM", "two iterations", "official loop", "PyTorch, by pseudo-inverses"],
        ),
        ("sleb", True, ["SLEB", "without its cache", "PyTorch"]),
        ("blocks", True, ["blocks", "PyTorch"]),
        ("distill", True, ["distill", "PyTorch"]),
        ("neuroal", True, ["NeuroAL", "official search", "PyTorch, trial by trial"]),
    ],
)
def test_pruning_runs_have_processes_of_their_own(
    what: str, torch: bool, programs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch:
        pytest.importorskip("torch")
    save(tmp_path / "model", init_model(CONFIG, jax.random.key(0)), CONFIG, tmp_path)
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, 64, (4, 16), np.int32))
    argv = [
        f"--model={tmp_path / 'model'}",
        f"--calibration={tmp_path / 't.npy'}",
        "--runs=1",
        "--blocks=1",
        f"--what={what}",
    ]
    assert run(bench.options(), bench.main, [*argv, f"--json={tmp_path / 'b.json'}"]) == 0
    figures = json.loads((tmp_path / "b.json").read_text())["figures"]
    assert list(figures) == programs
    assert all(f["seconds"][0] > 0 and f["peak_memory_bytes"] > 1e7 for f in figures.values())
    assert "peak memory" in capsys.readouterr().out
