"""The agreement in a report is that of the logits of transformers, in float64."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from calibration.data import Tokens
from eval.perplexity import perplexity
from launch import evaluate
from launch.flags.cli import run
from launch.run import samples
from launch.run.agreement import DenseStates, figures
from models.arch import Model
from models.checkpoint.hub import resolve
from models.progress import no_progress
from models.sharding import make_mesh
from reference import tiny, torch_models
from reference.prune_runs import call, report_of
from reference.told import Told

DATA = {
    "stories": Tokens(tiny.tokens(batch=5), {}, []),
    "others": Tokens(tiny.tokens(batch=2, length=16, seed=1), {}, []),
}


def compare(states: DenseStates, model: Model, progress: Any = no_progress) -> dict[str, Any]:
    comparisons = states.comparisons(model, progress)
    for name, tokens in DATA.items():
        perplexity(model, tokens.ids, batch=4, mesh=states._mesh, visit=comparisons[name])
    return figures(comparisons)


@pytest.mark.parametrize("mesh", ["data=1", pytest.param("data=4,model=2", marks=pytest.mark.slow)])
def test_states_that_are_missing_are_computed_again_to_the_bit(mesh: str) -> None:
    """As in a resumed run, which does not evaluate the dense model again."""
    dense, other = (tiny.random_model(tiny.GQA, seed) for seed in (0, 1))
    evaluated, resumed = (DenseStates(dense, DATA, 4, make_mesh(mesh)) for _ in range(2))
    for name, record in evaluated.recorders().items():
        perplexity(dense, DATA[name].ids, batch=4, mesh=make_mesh(mesh), visit=record)
    told = Told()
    first = compare(evaluated, other, told)
    assert not told.stages
    assert compare(resumed, other, told) == first and len(told.stages) == len(DATA)
    # Another model is compared with the same states. A mesh may round the two otherwise.
    itself = {"kl": 0.0, "kl_stderr": 0.0, "top1": 1.0, "top1_stderr": 0.0}
    for measured in compare(evaluated, dense).values():
        assert measured == pytest.approx(itself, abs=0 if mesh == "data=1" else 1e-8)
    if mesh != "data=1":
        alone = compare(DenseStates(dense, DATA, 4, None), other)
        for name, measured in first.items():
            assert alone[name] == pytest.approx(measured, rel=1e-4)


def test_beginnings_are_spread_evenly_over_a_data_set() -> None:
    windows = np.arange(40)[:, None] + np.zeros((1, 50), int)
    rows = samples._beginnings(windows)
    assert [row[0] for row in rows] == [40 * k // 16 for k in range(16)]
    assert {len(row) for row in rows} == {32}
    assert [len(row) for row in samples._beginnings(windows[:3, :7])] == [7] * 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Windows of stories that the embedded models know."""
    root = tmp_path_factory.mktemp("inputs")
    argv = ["--model=embedded:tiny-llama", "--eval_length=48", "--eval_windows=6"]
    tokens = evaluate.read_evaluation
    kept: dict[str, Tokens] = {}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluate, "read_evaluation", lambda *a: kept.update(tokens(*a)) or dict(kept))
        assert run(evaluate.options(), evaluate.main, argv) == 0
    np.save(root / "eval.npy", kept["embedded"].ids)
    return root


def by_transformers(
    dense: pathlib.Path, pruned: pathlib.Path, windows: np.ndarray
) -> dict[str, float]:
    """Return the measures from the logits and greedy texts of transformers, in float64."""
    models = [torch_models.load(directory) for directory in (dense, pruned)]
    z, w = (torch_models.logits(m, windows).astype(np.float64)[:, :-1] for m in models)
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (z, w))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(1)
    top1 = (z.argmax(-1) == w.argmax(-1)).mean(1)
    first, second = (torch_models.greedy(m, windows[:, :32], 32) for m in models)
    counts = [
        next((k for k in range(32) if a[k] != b[k]), 32) for a, b in zip(first, second, strict=True)
    ]
    result = {"greedy_most": 32, "greedy_prompts": len(windows)}
    for name, values in (("kl", kl), ("top1", top1), ("greedy", counts)):
        result[name] = np.mean(values)
        result[f"{name}_stderr"] = np.std(values, ddof=1) / len(windows) ** 0.5
    return result


@pytest.mark.slow
def test_the_report_equals_transformers(inputs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """So does that of a second round, and `launch.evaluate` with the dense model."""
    data = str(inputs / "eval.npy")
    argv = [f"--calibration={data}", f"--eval_data={data}", "--calibration_batch=2"]
    model = "embedded:tiny-llama"
    rounds = ((model, "flap"), (str(tmp_path / "0"), "wanda"))
    for k, (source, method) in enumerate(rounds):
        out, flags = tmp_path / str(k), [f"--method={method}", "--sparsity=0.3"]
        assert call([f"--model={source}", f"--output={out}", *flags, *argv]) == 0
        expected = by_transformers(
            pathlib.Path(source) if k else resolve(model), out, np.load(inputs / "eval.npy")
        )
        found = report_of(out)["agreement"][data]
        assert found == pytest.approx(expected, rel=1e-4)
        assert found["kl"] > 1e-3
    file = tmp_path / "e.json"
    flags = [f"--model={tmp_path / '0'}", f"--dense={model}", f"--json={file}"]
    assert run(evaluate.options(), evaluate.main, [*flags, f"--eval_data={data}"]) == 0
    got = json.loads(file.read_text())
    assert got["agreement"][data] == pytest.approx(
        report_of(tmp_path / "0")["agreement"][data], rel=1e-4
    )
    assert got["protocol"]["dense"] == model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unpruned_model_agrees_wholly(
    dtype: str, inputs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data, out = str(inputs / "eval.npy"), tmp_path / "out"
    argv = [f"--calibration={data}", f"--eval_data={data}", f"--output={out}", f"--dtype={dtype}"]
    assert call(["--model=embedded:tiny-opt", "--method=magnitude", "--sparsity=0", *argv]) == 0
    found = report_of(out)["agreement"][data]
    assert found == {
        "kl": 0.0,
        "kl_stderr": 0.0,
        "top1": 1.0,
        "top1_stderr": 0.0,
        "greedy": 32.0,
        "greedy_stderr": 0.0,
        "greedy_most": 32,
        "greedy_prompts": 6,
    }


@pytest.mark.slow
def test_a_model_of_another_vocabulary_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.write(tmp_path / "m", tiny.state_of(tiny.GQA, tiny.random_model(tiny.GQA)))
    np.save(tmp_path / "eval.npy", tiny.tokens())
    argv = [f"--model={other}", "--dense=embedded:tiny-opt", f"--eval_data={tmp_path / 'eval.npy'}"]
    assert run(evaluate.options(), evaluate.main, argv) == 2
    assert "--dense has a vocabulary of 1024 tokens, the model 96" in capsys.readouterr().err
