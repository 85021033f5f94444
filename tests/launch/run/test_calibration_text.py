"""Runs on a mix, and on text that the model writes: one result, written once, in every command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from calibration import generated
from calibration.data import calibration_tokens
from calibration.step_cache import StepCache
from calibration.tokenizer import load_tokenizer
from launch import plan, prune, sweep
from launch.flags.cli import frozen, run
from launch.report import html
from launch.report.files import read_report
from launch.run.job import RunConfig
from models.checkpoint.writer import save
from models.init import init_model
from reference import tiny_tokenizer
from reference.prune_runs import call, report_of, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_samples", "no_transformers")]

LLAMA = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer, a text and evaluation windows."""
    root = tmp_path_factory.mktemp("inputs")
    save(root / "llama", init_model(LLAMA, jax.random.key(1)), LLAMA, root)
    tiny_tokenizer.write(root / "llama")
    np.save(root / "tokens.npy", np.random.default_rng(0).integers(0, 96, (4, 16), np.int32))
    (root / "a.txt").write_text("once upon a time there came a king and his big hat " * 40)
    return root


@pytest.fixture(autouse=True)
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Use an empty cache, and note every batch that a model writes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    written: list[int] = []
    inner: Callable[..., np.ndarray] = generated.generate

    def noted(*arguments: Any, **options: Any) -> np.ndarray:
        written.append(1)
        return inner(*arguments, **options)

    monkeypatch.setattr(generated, "generate", noted)
    return written


def argv(inputs: Path, output: Path, calibration: str, *more: str) -> list[str]:
    data = [
        f"--calibration={calibration}",
        "--calibration_samples=12",
        "--calibration_length=16",
        f"--eval_data={inputs / 'tokens.npy'}",
    ]
    fixed = ["--method=wanda", "--sparsity=0.5", "--calibration_batch=4", "--mesh=data=1"]
    return [f"--model={inputs / 'llama'}", f"--output={output}", *data, *fixed, *more]


def same_weights(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one)


def test_a_run_on_a_mix_says_what_it_read(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = f'self(prompts="{inputs / "a.txt"}",prompt_tokens=2):1,{inputs / "a.txt"}:2'
    assert call(argv(inputs, tmp_path / "out", mix)) == 0
    assert "calibration windows: 4 of self(prompts=" in capsys.readouterr().err
    report = report_of(tmp_path / "out")
    calibration = report["protocol"]["calibration"]
    first, second = calibration["parts"]
    assert (first["windows"], second["windows"]) == (4, 8)
    tokenizer = load_tokenizer(inputs / "llama")
    alone = calibration_tokens(
        str(inputs / "a.txt"), lambda: tokenizer, samples=8, length=16, seed=0, vocab=96
    )
    assert second["sha256"] == alone.protocol["sha256"] != calibration["sha256"]
    page, card = html.render(report), (tmp_path / "out" / "README.md").read_text()
    assert first["sha256"] in page and second["sha256"] in page
    assert "self, 4 windows of 16 tokens" in card and "a.txt, 8 windows of 16 tokens" in card
    assert str(inputs) not in card


def test_a_mix_of_one_source_prunes_as_that_source(inputs: Path, tmp_path: Path) -> None:
    for name, text in (("alone", "{}"), ("mixed", "{}:0.5")):
        source = text.format(inputs / "a.txt")
        assert call(argv(inputs, tmp_path / name, source)) == 0
    assert same_weights(tmp_path / "alone", tmp_path / "mixed")
    one, two = (report_of(tmp_path / name)["protocol"] for name in ("alone", "mixed"))
    assert one["calibration"] == two["calibration"]


def test_an_interrupted_run_goes_on_with_the_same_windows(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    text = f"self(temperature=0.8):1,{inputs / 'a.txt'}:1"
    assert call(argv(inputs, tmp_path / "whole", text)) == 0
    assert len(batches) == 1
    complete = prune.complete

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "complete", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        raise SystemExit(call(argv(inputs, tmp_path / "out", text)))
    monkeypatch.setattr(prune, "complete", complete)
    assert call(argv(inputs, tmp_path / "out", text)) == 0
    assert any("interrupted" in note for note in report_of(tmp_path / "out")["notes"])
    assert same_weights(tmp_path / "out", tmp_path / "whole")
    assert len(batches) == 1  # one for all three starts
    one, two = (report_of(tmp_path / name)["protocol"] for name in ("whole", "out"))
    assert one["calibration"] == two["calibration"]


def test_draws_write_their_own_windows(inputs: Path, tmp_path: Path, batches: list[int]) -> None:
    assert call(argv(inputs, tmp_path / "all", "self", "--calibration_draws=2")) == 0
    assert len(batches) == 4  # two batches of eight for twelve windows
    assert call(argv(inputs, tmp_path / "one", "self", "--seed=1")) == 0
    assert len(batches) == 4
    draws = report_of(tmp_path / "all")["draws"]
    assert draws[0]["sha256"] != draws[1]["sha256"]
    assert draws[1]["sha256"] == report_of(tmp_path / "one")["protocol"]["calibration"]["sha256"]


def test_a_sweep_lets_the_model_write_once(
    inputs: Path, tmp_path: Path, batches: list[int]
) -> None:
    args = argv(inputs, tmp_path / "sweep", f"self:1,{inputs / 'a.txt'}:1")
    args = [a for a in args if not a.startswith(("--method=", "--sparsity="))]
    args += ["--methods=wanda,magnitude", "--sparsities=0.5,0.6"]
    assert run(sweep.options(), sweep.main, args) == 0
    assert len(batches) == 1
    (path,) = (tmp_path / "sweep").glob("**/wanda-0.5-*/pruning_report.json")
    read_report(path.parent)
    assert call(argv(inputs, tmp_path / "run", f"self:1,{inputs / 'a.txt'}:1")) == 0
    assert same_weights(path.parent, tmp_path / "run") and len(batches) == 1


def test_trials_elsewhere_write_their_own_windows(
    inputs: Path, tmp_path: Path, batches: list[int]
) -> None:
    flags = [
        f"--model={inputs / 'llama'}",
        "--methods=wanda",
        "--sparsities=0.5",
        "--calibration=self",
        "--calibration_samples=2",
        "--calibration_length=16",
        f"--eval_data={inputs / 'tokens.npy'}",
    ]
    values = sweep.options().parse(flags)
    trials = sweep.grid(values, tmp_path / "o")
    assert sweep.check(trials, "slurm", StepCache()).possible == trials
    assert not batches
    sweep.check(trials, "local", StepCache())
    assert len(batches) == 1


def test_a_plan_counts_the_memory_of_writing(inputs: Path, tmp_path: Path) -> None:
    shown = {}
    for text in ("embedded", "embedded:1,self:1"):
        values = plan.options().parse(argv(inputs, tmp_path / "o", text))
        shown[text] = plan.plan(values)["memory"]["device"]
    assert shown["embedded"]["writing_windows"] == 0
    needed = shown["embedded:1,self:1"]["writing_windows"]
    model = sum(x.nbytes for x in weights(inputs / "llama").values())
    cache = 2 * 3 * 16 * 16 * generated.BATCH * 4  # keys and values, blocks, width, length
    assert needed == model + cache
    assert shown["embedded:1,self:1"]["peak"] >= needed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embedded:1,none.txt:1", "error: --calibration=none.txt does not exist"),
        ("embedded:x", "error: --calibration=embedded:x has the share 'x', which is no number"),
        ("embedded:1,self:0.001", "error: --calibration_samples=12 leaves no window for self"),
        ("self(temperature=0)", "error: --calibration=self with temperature=0 writes fewer"),
        ("{}/tokens.npy:9,self:1", "has 4 windows, its share of the mix is 11"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert call(argv(inputs, tmp_path / "out", text.format(inputs))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --calibration") and message in error
    assert not (tmp_path / "out").exists()


def test_the_settings_of_a_report_repeat_the_run(inputs: Path, tmp_path: Path) -> None:
    text = f'self(prompts="{inputs / "a.txt"}",prompt_tokens=2):1,embedded:2'
    values = prune.options().parse(argv(inputs, tmp_path / "o", text))
    words = prune.command(frozen(RunConfig, values))
    assert json.dumps(text)[1:-1] in json.dumps(words)
