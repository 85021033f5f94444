"""Each calibration draw equals the run of its seed, and an interrupted run resumes its draws."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from launch import compare, plan
from launch.prune import RunConfig, frozen
from launch.report import console
from launch.report import html as report
from launch.run import draws
from models.checkpoint.writer import save
from models.init import init_model
from reference.prune_runs import call, report_of, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_samples", "no_transformers")]

LLAMA = dict(
    model_type="llama",
    vocab_size=1024,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the tokenizer of an embedded one, to draw windows from text."""
    root = tmp_path_factory.mktemp("inputs")
    save(root / "llama", init_model(LLAMA, jax.random.key(1)), LLAMA, root)
    embedded = Path(__file__).parents[3] / "models" / "embedded" / "tiny-llama"
    for file in embedded.glob("tokenizer*"):
        shutil.copy(file, root / "llama")
    np.save(root / "tokens.npy", np.random.default_rng(0).integers(0, 1024, (4, 16), np.int32))
    (root / "short.txt").write_text("Once there was a cat.")
    return root


def argv(inputs: Path, output: Path, *more: str) -> list[str]:
    data = [
        "--calibration=embedded",
        "--calibration_samples=4",
        "--calibration_length=16",
        f"--eval_data={inputs / 'tokens.npy'}",
    ]
    fixed = ["--sparsity=0.5", "--calibration_batch=2", "--mesh=data=1"]
    return [f"--model={inputs / 'llama'}", f"--output={output}", *data, *fixed, *more]


@pytest.mark.parametrize("method", ["wanda", "flap", "sleb(blocks=1)"])
def test_a_draw_is_the_run_of_its_seed(method: str, inputs: Path, tmp_path: Path) -> None:
    for seed in (3, 4, 5):
        assert call(argv(inputs, tmp_path / str(seed), f"--method={method}", f"--seed={seed}")) == 0
    args = argv(inputs, tmp_path / "all", f"--method={method}", "--seed=3", "--calibration_draws=3")
    assert call([a for a in args if "blocks" not in method or "sparsity" not in a]) == 0
    got, data = report_of(tmp_path / "all"), str(inputs / "tokens.npy")
    alone = [report_of(tmp_path / str(seed)) for seed in (3, 4, 5)]
    values = [r["perplexity"][data]["pruned"] for r in alone]
    assert [d["seed"] for d in got["draws"]] == [3, 4, 5]
    assert [d["sha256"] for d in got["draws"]] == [
        r["protocol"]["calibration"]["sha256"] for r in alone
    ]
    assert [d["perplexity"][data] for d in got["draws"]] == values
    assert [d["agreement"] for d in got["draws"]] == [r["agreement"] for r in alone]
    divergences = [r["agreement"][data]["kl"] for r in alone]
    spread = got["spread"]["agreement"][data]["kl"]
    assert spread["mean"] == pytest.approx(np.mean(divergences), rel=1e-12)
    want = {
        "mean": np.mean(values),
        "std": np.std(values, ddof=1),
        "min": min(values),
        "max": max(values),
    }
    assert got["spread"]["perplexity"][data] == pytest.approx(want, rel=1e-12)
    assert got["perplexity"] == alone[0]["perplexity"] and got["seconds"]["draws"] > 0
    assert "draws" not in alone[0] and "spread" not in alone[0]
    for name, x in weights(tmp_path / "3").items():
        np.testing.assert_array_equal(weights(tmp_path / "all")[name], x)
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(
        p.name for p in (tmp_path / "3").iterdir()
    )


def test_every_report_shows_the_spread(inputs: Path, tmp_path: Path) -> None:
    assert call(argv(inputs, tmp_path / "out", "--method=wanda", "--calibration_draws=2")) == 0
    got = report_of(tmp_path / "out")
    found = next(iter(got["spread"]["perplexity"].values()))
    said = (
        f"{found['mean']:,.3f} ± {found['std']:.3f}"
        if found["mean"] < 1e3
        else f"{found['mean']:,.1f} ± {found['std']:.3f}"
    )
    terminal = Console(file=io.StringIO(), width=200)
    console.show(got, terminal)
    assert (
        said in terminal.file.getvalue() and "over 2 calibration draws" in terminal.file.getvalue()
    )  # type: ignore[attr-defined]
    assert report.render(got).count(said) == 2  # beside the headline, in the table
    runs = compare.read([str(tmp_path / "out")], None)
    table = compare.rows(runs, compare.marks_of(runs))
    assert f"({said} over 2 draws)" in table[2][4] and "draws" not in table[1][4]
    kl = next(iter(got["spread"]["agreement"].values()))["kl"]
    assert f"{kl['mean']:.4f} ± {kl['std']:.4f}" in terminal.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--calibration={}/tokens.npy", "is taken whole"),
        ("--calibration={}/short.txt", "too little text for so many different draws"),
    ],
)
def test_draws_that_would_be_the_same_are_refused(
    flag: str, said: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--method=wanda",
        "--calibration_draws=2",
        flag.format(inputs),
        "--calibration_length=4",
        "--calibration_samples=1",
    ]
    if "short" in flag:  # all of it but one token is the only window that can be drawn
        length = next(
            n
            for n in range(1, 16)
            if call(argv(inputs, tmp_path / "n", *more, f"--calibration_length={n}")) == 2
        )
        more.append(f"--calibration_length={length}")
    capsys.readouterr()
    assert call(argv(inputs, tmp_path / "out", *more)) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: --calibration_draws=2") and said in err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_resumes_its_draws(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every few durable files: finished draws are not repeated, figures are equal."""
    monkeypatch.setattr("calibration.journal.SAVE_TIME_FRACTION", 1e9)  # save after every block
    args = ["--method=wanda", "--calibration_draws=3"]
    assert call(argv(inputs, tmp_path / "whole", *args)) == 0
    replace, budget, done = os.replace, 0, []

    def fragile(a: Any, b: Any) -> None:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise KeyboardInterrupt
        replace(a, b)

    def counted(tokens: Any, *rest: Any) -> Any:
        result = prune_draw(tokens, *rest)
        done.append(tokens.protocol["seed"])
        return result

    prune_draw = draws.prune_draw
    monkeypatch.setattr(draws, "prune_draw", counted)
    monkeypatch.setattr("calibration.journal.os.replace", fragile)
    codes = []
    while not codes or codes[-1] != 0:
        budget = 7 if codes else 9  # 9: in the middle of the first file of a draw's journal
        codes.append(call(argv(inputs, tmp_path / "cut", *args)))
        assert len(codes) < 30
    assert len(codes) > 3 and set(codes) == {0, 130}
    assert sorted(set(done)) == [1, 2] and len(done) <= 4, (
        "a finished draw is at most measured again, never twice"
    )
    whole, cut = report_of(tmp_path / "whole"), report_of(tmp_path / "cut")
    assert cut["draws"] == whole["draws"] and cut["spread"] == whole["spread"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]
    assert not (tmp_path / "cut" / "unfinished").exists()


def test_a_collapsed_draw_counts_in_the_spread() -> None:
    tasks = {"t": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
    of = {"seed": 0, "sha256": "", "agreement": {"d": {"kl": 0.5}}, "tasks": tasks}
    found = draws.spread(
        [{**of, "perplexity": {"d": 2.0}}, {**of, "perplexity": {"d": float("inf")}}]
    )
    assert found["perplexity"]["d"]["min"] == 2.0 and np.isinf(found["perplexity"]["d"]["mean"])
    assert np.isnan(found["perplexity"]["d"]["std"])
    half = {"mean": 0.5, "std": 0.0, "min": 0.5, "max": 0.5}
    assert found["tasks"] == {"t": {"acc,none": half}}
    assert found["agreement"] == {"d": {"kl": half}}


def test_a_plan_counts_every_draw(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "flops_per_second", lambda dtype: 1.0)

    def planned(*more: str) -> dict[str, Any]:
        return plan.plan(
            plan.options().parse([*argv(inputs, Path("out"), "--method=wanda", *more)])
        )

    one, three = planned(), planned("--calibration_draws=3")
    assert (
        three["total"]["flops"] == 3 * one["total"]["flops"]
        and three["total"]["device_bytes"] == one["total"]["device_bytes"]
    )
    output = "output_at_most"
    assert three["memory"]["disk"][output] == 2 * one["memory"]["disk"][output]
    assert frozen(RunConfig, plan.options().parse(["--calibration_draws=2"])).calibration_draws == 2
