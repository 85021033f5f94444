"""The benchmark measures what it says, in turn, and writes its figures. No time is asserted."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import bench
from launch.benchmarks import solvers as bench_solvers
from launch.flags.cli import run
from models.checkpoint.writer import save
from models.init import init_model
from pruning.methods import METHODS
from pruning.types import Request, prune
from reference import sparsegpt as reference
from reference import torch_models

CONFIG = dict(model_type="llama", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=16, architectures=["LlamaForCausalLM"])  # fmt: skip


def test_programs_run_in_turn_after_one_warm_up_each() -> None:
    order: list[str] = []
    seconds = bench.time_in_turn(
        {name: lambda name=name: order.append(name) for name in "ab"}, runs=3
    )
    assert "".join(order) == "ab" + "ababab"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3} and min(
        map(min, seconds.values())
    ) >= 0


@pytest.mark.parametrize("torch", [False, True])
def test_the_command_writes_its_figures(
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
        (
            "sparsellm",
            True,
            ["SparseLLM", "of two iterations", "released loop", "PyTorch, by pseudo-inverses"],
        ),
        ("sleb", True, ["SLEB", "without its cache", "PyTorch"]),
        ("neuroal", True, ["NeuroAL", "released search", "PyTorch, trial by trial"]),
    ],
)
def test_pruning_runs_in_processes_of_their_own(
    what: str, torch: bool, programs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the peak memory of each."""
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


def test_the_plain_sparsegpt_is_sparsegpt(tmp_path: Path) -> None:
    """What ours is timed against does the same work: the same weights, up to ties of a rounding."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    w, x = (
        rng.normal(size=(24, 160)),
        rng.normal(size=(600, 160)) @ rng.normal(size=(160, 160)) * 0.1,
    )
    h = x.T @ x * 2 / 4
    got = bench_solvers._sweep(
        torch.tensor(w, dtype=torch.float32), torch.tensor(h, dtype=torch.float32), 0.5
    ).numpy()
    want, removed = reference.solve(w, h, 0.5)
    assert np.mean((got == 0) == removed) > 0.999
    assert np.quantile(np.abs(got - want), 0.99) < 1e-3


def test_the_plain_alternation_is_the_released_one(tmp_path: Path) -> None:
    """What ours is timed against leaves the weights that the official variant leaves."""
    torch = pytest.importorskip("torch")
    config = CONFIG | {"num_hidden_layers": 1, "initializer_range": 0.3}
    model = init_model(config, jax.random.key(0))
    save(tmp_path / "model", model, config, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16), np.int32)
    theirs = torch_models.load(tmp_path / "model")
    (layer,) = theirs.get_decoder().layers
    with torch.no_grad():
        calls = bench_solvers._first_inputs(theirs, layer, torch.tensor(tokens.astype(np.int64)))
        bench_solvers.alternated(layer, calls, 0.5)
    block = prune(model, METHODS["sparsellm"](variant="official"), tokens, Request(0.5))[0].blocks[
        0
    ]
    for name in ("up", "gate", "down", "q"):
        want = np.asarray(getattr(block, name).w)
        part = layer.self_attn if name == "q" else layer.mlp
        got = getattr(part, f"{name}_proj").weight.detach().numpy()
        assert np.array_equal(got == 0, want == 0), name
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * np.abs(want).max(), err_msg=name)


def test_the_plain_removal_is_sleb(tmp_path: Path) -> None:
    """What ours is timed against removes the same blocks in the same order."""
    config = CONFIG | {"num_hidden_layers": 6, "initializer_range": 0.3}
    model = init_model(config, jax.random.key(0))
    save(tmp_path / "model", model, config, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 16), np.int32)
    theirs = torch_models.load(tmp_path / "model")
    want = prune(model, METHODS["sleb"](blocks=3), tokens, Request(0.0))[1].details["removal_order"]
    assert bench_solvers.removed(theirs, list(theirs.get_decoder().layers), tokens, 3) == want
