"""The table of every method: its arithmetic, its programs, and the authors' code."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest
from rich.console import Console

from launch import bench
from launch.benchmarks import every, shares
from launch.benchmarks.every_programs import count_flops
from launch.benchmarks.solvers import Task
from launch.flags.cli import run
from models.checkpoint.writer import save
from models.errors import InputError
from models.init import init_model
from pruning.methods import METHODS

D, F, VOCAB, BLOCKS, WINDOWS, LENGTH = 16, 32, 64, 2, 4, 16
CONFIG = dict(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=BLOCKS,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    architectures=["LlamaForCausalLM"],
)


@pytest.fixture
def task(tmp_path: pathlib.Path) -> Task:
    save(tmp_path / "model", init_model(CONFIG, jax.random.key(0)), CONFIG, tmp_path)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (WINDOWS, LENGTH), np.int32)
    np.save(tmp_path / "t.npy", tokens)
    return Task(tmp_path / "model", tokens, 0.5, 2, 0)


def test_the_floor_counts_every_product(task: Task) -> None:
    tokens = WINDOWS * LENGTH
    attention = 2 * 2 * tokens * LENGTH * D  # 16 positions are one chunk: no triangle is saved
    block = 2 * tokens * (4 * D * D + 3 * D * F) + attention
    assert count_flops(task, "|uniform") == BLOCKS * block + 2 * tokens * D * VOCAB
    # Wanda runs every block dense and, but for the last, pruned; it needs no head.
    assert count_flops(task, "wanda|uniform") == (2 * BLOCKS - 1) * block


def test_rows_are_methods_of_the_project_and_chosen_by_name() -> None:
    for row in every.ROWS:
        assert not row.method or row.method.partition("(")[0] in METHODS
    assert [row.name for row in every.chosen("flap_official, wanda")] == ["flap official", "wanda"]
    assert every.chosen("") == every.ROWS
    with pytest.raises(InputError, match="is no row of the table"):
        every.chosen("wonda")


def test_the_table_fits_a_terminal_of_eighty_columns() -> None:
    part = {"seconds": [1234.5], "peak_memory_bytes": 12 << 30}
    parts = dict.fromkeys(("cold", "second", "warm", "PyTorch", "authors"), part)
    ratios = {"PyTorch": 12.5, "authors": 0.5}
    row = parts | {"floor": 1000.0, "over_floor": 1.2345, "faster": ratios}
    rows = {row_.name: row for row_ in every.ROWS} | {"tiny": row | {"floor": 0.0123}}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(every.table("model", {"rows": rows, "mean": ratios}))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "flap official 1234 1234 1234 1234 1234 12.0 1000 1.23 12.50x 0.50x" in lines
    assert any(line.startswith("tiny") and " 0.012 " in line for line in lines)
    assert not any("…" in line for line in lines)
    assert "12.50 times as fast as PyTorch, 0.50 times as fast as authors." in " ".join(lines)


@pytest.mark.slow
def test_the_command_times_rows_and_the_authors_code(
    task: Task, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "authors/wanda/run"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\ntest -f $2 && echo pruned $1 to $3 && echo 12.5\n")
    program.chmod(0o755)
    argv = [f"--model={task.directory}", f"--calibration={tmp_path / 't.npy'}", "--what=all"]
    argv += [
        "--rows=wanda,perplexity",
        "--runs=1",
        f"--authors={tmp_path / 'authors'}",
        "--notorch",
    ]
    assert run(bench.options(), bench.main, [*argv, f"--json={tmp_path / 'b.json'}"]) == 0
    figures = json.loads((tmp_path / "b.json").read_text())["figures"]
    wanda, text = figures["rows"]["wanda"], capsys.readouterr().out
    assert wanda["authors"]["seconds"] == [12.5]
    assert wanda["faster"]["authors"] == 12.5 / wanda["warm"]["seconds"][0]
    assert figures["mean"]["authors"] == pytest.approx(wanda["faster"]["authors"])
    assert figures["rows"]["perplexity"]["faster"] == {}
    # A process that finds the programs of another compiles nothing.
    assert wanda["second"]["seconds"][0] < wanda["cold"]["seconds"][0]
    assert "Geometric mean" in text


def test_shares_add_up_to_the_whole_and_name_the_programs(task: Task) -> None:
    for row in every.chosen("flap,sparsegpt"):
        parts = shares.time_parts(row.task(task), row.argument)
        assert sum(parts["programs"].values()) + parts["host"] == pytest.approx(parts["total"])
        assert {"statistics", "embedding"} < set(parts["programs"])
        assert all(parts[key] > 0 for key in ("host", "read", "write", "compile"))


@pytest.mark.slow
def test_the_command_shows_the_shares_of_methods(
    task: Task, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--model={task.directory}", f"--calibration={tmp_path / 't.npy'}", "--what=shares"]
    assert run(bench.options(), bench.main, [*argv, "--rows=wanda,perplexity"]) == 0
    text = capsys.readouterr().out
    assert "statistics" in text and "%" in text and "perplexity" not in text


@pytest.mark.slow
def test_authors_code_that_prints_no_seconds_is_named(task: Task, tmp_path: pathlib.Path) -> None:
    program = tmp_path / "run"
    program.write_text("#!/bin/sh\necho no module torch >&2; exit 3\n")
    program.chmod(0o755)
    with pytest.raises(InputError, match="exit code 3: no module torch"):
        every._run_authors(program, task)
