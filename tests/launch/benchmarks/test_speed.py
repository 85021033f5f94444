"""The speed benchmark measures dense and pruned checkpoints and writes its results."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from eval.size import count_entries
from launch import bench
from launch.benchmarks import speed as bench_speed
from launch.benchmarks.speed_programs import Task, Times
from launch.flags.cli import run
from launch.report.files import read_report, write_reports
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
    max_position_embeddings=24,
    architectures=["LlamaForCausalLM"],
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a `dense` checkpoint and one of half the neurons, `narrow`."""
    root = tmp_path_factory.mktemp("models")
    for name, neurons in (("dense", 32), ("narrow", 16)):
        config = CONFIG | {"intermediate_size": neurons}
        save(root / name, init_model(config, jax.random.key(0)), config, root)
    return root


def call(models: Path, *args: str) -> int:
    argv = [
        "--what=speed",
        f"--model={models / 'dense'}",
        f"--pruned={models / 'narrow'}",
        "--new_tokens=8",
        *args,
    ]
    return run(bench.options(), bench.main, argv)


def test_the_command_writes_its_results(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        f"--json={tmp_path / 's.json'}",
        f"--plot={tmp_path / 's.svg'}",
        "--runs=2",
        "--batch_sizes=1,2",
        "--notorch",
    ]
    assert call(models, *argv) == 0
    result = json.loads((tmp_path / "s.json").read_text())
    assert (result["prompt_length"], result["new_tokens"]) == (16, 8)  # of 24 positions
    assert result["peak_flops_per_second"] > 1e8
    for batch in (1, 2):
        rows = result["figures"][str(batch)]
        assert list(rows) == [str(models / "dense"), str(models / "narrow")]
        for name, row in rows.items():
            check(row, batch)
            assert row["parameters"] == count(32 if "dense" in name else 16)
        dense, narrow = rows.values()
        assert dense["speedup"] == {"prompt": 1, "generation": 1}
        assert all(
            narrow[what][part] < dense[what][part]
            for what in ("flops", "bytes")
            for part in ("prompt", "token")
        )
    out = capsys.readouterr().out
    assert "prompts of 16 tokens" in out and "models' positions" in out
    svg = (tmp_path / "s.svg").read_text()
    assert "narrow" in svg and "batch 2" in svg


def test_the_speed_goes_into_the_report_of_the_pruned_model(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "narrow", tmp_path / "narrow")
    report = {"model": "m", "method": "flap", "sparsity": {"prunable": 0.5}}
    write_reports(tmp_path / "narrow", report)
    more = [f"--pruned={tmp_path / 'narrow'}", "--runs=1", "--notorch", "--report"]
    assert call(models, *more) == 0
    written = read_report(tmp_path / "narrow")
    speed = written.pop("speed")
    assert written == report
    assert (speed["prompt_length"], speed["new_tokens"], speed["dtype"]) == (16, 8, "float32")
    for part in ("prompt", "generation"):
        figures = speed["batches"]["1"][part]
        assert figures["speedup"] == pytest.approx(figures["pruned"] / figures["dense"])
    assert "Generation, batch 1" in (tmp_path / "narrow" / "report.html").read_text()


def count(neurons: int) -> int:
    model = init_model(CONFIG | {"intermediate_size": neurons}, jax.random.key(0))
    return count_entries((model.non_block, model.blocks))


def check(row: dict[str, Any], batch: int) -> None:
    """Check that the numbers agree, and that XLA counts about the work that the shapes need."""
    assert all(len(s) == 2 and min(s) > 0 for s in row["seconds"].values())
    assert row["tokens_per_second"]["prompt"] == pytest.approx(16 * batch / row["median"]["prompt"])
    assert row["tokens_per_second"]["generation"] == pytest.approx(
        7 * batch / row["median"]["generation"]
    )
    products = 2 * (row["parameters"] - 64 * 16) * batch  # the embedding is looked up
    assert 0.9 * products < row["flops"]["token"] < 3 * products
    assert 8 * products < row["flops"]["prompt"] < 48 * products
    assert row["peak_memory_bytes"]["host"] > 1e7
    assert 0 < row["share_of_peak"]["prompt"] < 1


def test_pytorch_is_measured_too(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert (
        call(
            models,
            f"--json={tmp_path / 's.json'}",
            "--runs=1",
            "--prompt_length=5",
            f"--plot={tmp_path / 's.png'}",
        )
        == 0
    )
    rows = json.loads((tmp_path / "s.json").read_text())["figures"]["1"]
    assert list(rows)[-1] == bench_speed.TORCH
    assert rows[bench_speed.TORCH]["parameters"] == count(32)
    assert "share_of_peak" not in rows[bench_speed.TORCH]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch_sizes=1,x"], "--batch_sizes"),
        (["--batch_sizes=0"], "--batch_sizes"),
        (["--new_tokens=24"], "--new_tokens"),
        (["--plot=figures.pdf"], "--plot"),
        (["--mesh=data=1"], "--mesh"),
        (["--report"], "finds no report in"),
        (["--pruned=nowhere/at/all"], "nowhere"),
        (["--model="], "--model"),
    ],
)
def test_bad_input_is_one_line(
    models: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(models, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and message in error and error.count("\n") == 1


def test_a_broken_checkpoint_is_an_error_of_its_process(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG | {"vocab_size": 32}
    model = init_model(config, jax.random.key(0))
    blocks, non_block = jax.tree.map(lambda x: x * np.nan, (model.blocks, model.non_block))
    save(tmp_path / "nan", model._replace(blocks=blocks, non_block=non_block), config, tmp_path)
    assert call(models, f"--pruned={tmp_path / 'nan'}", "--runs=1", "--notorch") == 2
    assert "NaN" in capsys.readouterr().err


def test_speedups_are_medians_over_pairs_of_runs() -> None:
    task = Task(Path(), "float32", 2, 10, 5)
    times = [Times(1.0, 2.0), Times(3.0, 6.0), Times(2.0, 4.0)]
    found = {
        "dense": {"times": times, "flops": {"prompt": 60.0, "token": 3.0}},
        "half": {"times": [Times(t.prompt / 2, t.generation / 4) for t in times]},
    }
    dense, half = bench_speed.summarise(found, task, peak=30.0).values()
    assert half["speedup"] == {"prompt": 2.0, "generation": 4.0}
    assert dense["tokens_per_second"] == {"prompt": 10.0, "generation": 2.0}
    assert dense["share_of_peak"] == {"prompt": 1.0, "generation": 3 * 4 / 4 / 30}
