"""Zero-shot tasks in a run: both models' figures, the cache, resuming, early errors."""

import json
import pathlib
import sys
from typing import Any

import pytest

from launch import evaluate
from launch.flags.cli import run
from launch.run import export, measure
from reference.prune_runs import call, report_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_samples")]

MODEL = "--model=embedded:tiny-llama"
DATA = [
    "--calibration_samples=4",
    "--calibration_length=16",
    "--calibration_batch=4",
    "--eval_length=16",
    "--eval_windows=2",
]
METHOD = ["--method=magnitude", "--sparsity=0.7", "--mesh=data=1"]


@pytest.fixture(autouse=True)
def _home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def task(tmp_path: pathlib.Path) -> pathlib.Path:
    """A task of five stories, each with two endings."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")
    rows = [
        {"text": f"Once there was a {x}. The {x} was", "ends": ["very happy.", "qq."], "end": 0}
        for x in ("dog", "cat", "girl", "boy", "bird")
    ]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "stories.yaml"
    file.write_text(
        "task: stories\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: stories.jsonl}}\noutput_type: multiple_choice\n"
        'test_split: test\ndoc_to_text: "{{text}}"\ndoc_to_target: end\n'
        'doc_to_choice: "{{ends}}"\nmetadata: {version: 3}\n'
    )
    return file


@pytest.mark.filterwarnings("ignore")
def test_the_report_has_tasks_of_both_models_and_the_cache_repeats_them(
    task: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    argv = [
        MODEL,
        *DATA,
        *METHOD,
        f"--output={out}",
        f"--tasks={task}",
        "--trust_task_files",
        "--limit=4",
    ]
    assert call(argv) == 0
    r = report_of(out)
    figures = r["tasks"]["stories"]
    assert figures["dense"]["acc"] == 1.0 and 0 <= figures["pruned"]["acc"] <= 1
    assert (
        set(figures["dense"])
        == set(figures["pruned"])
        >= {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    )
    facts = r["protocol"]["tasks"]["stories"]
    assert facts["version"] == 3 and facts["documents"] == 4 and facts["num_fewshot"] == 0
    assert (
        facts["harness"].startswith("lm-eval 0.")
        and f"--tasks={task}" in r["command"]
        and "--limit=4" in r["command"]
    )
    said = capsys.readouterr()
    assert "stories, acc" in said.out and said.err.count("model: log-likelihoods: 256 tokens") == 2
    page = (out / "report.html").read_text()
    assert "Accuracy before and after" in page and facts["sha256"] in page

    monkeypatch.setattr(
        "eval.harness.log_likelihoods", fail
    )  # both models are in the cache by their weights
    file = tmp_path / "e.json"
    for model, which in (("embedded:tiny-llama", "dense"), (str(out), "pruned")):
        flags = [
            f"--model={model}",
            "--eval_length=16",
            "--eval_windows=2",
            f"--json={file}",
            f"--tasks={task}",
            "--trust_task_files",
            "--limit=4",
        ]
        assert run(evaluate.options(), evaluate.main, flags) == 0
        assert json.loads(file.read_text())["tasks"] == {"stories": {"dense": figures[which]}}
    with pytest.raises(AssertionError, match="asked"):
        run(evaluate.options(), evaluate.main, [*flags, "--notask_cache"])
    with pytest.raises(AssertionError, match="asked"):
        run(evaluate.options(), evaluate.main, [*flags, "--dtype=bfloat16"])


def fail(*args: Any, **more: Any) -> None:
    raise AssertionError("a model was asked")


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_run_does_not_ask_the_dense_model_again(
    task: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    argv = [
        MODEL,
        *DATA,
        *METHOD,
        f"--output={tmp_path / 'out'}",
        f"--tasks={task}",
        "--trust_task_files",
        "--notask_cache",
    ]
    asked: list[object] = []
    real = measure.evaluate_tasks

    def count(*args: Any) -> Any:
        asked.append(args[1].directory)
        return real(*args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(measure, "evaluate_tasks", count)
        m.setattr(export, "load_back", fail)
        with pytest.raises(AssertionError):
            call(argv)
        assert len(asked) == 1
    with pytest.MonkeyPatch.context() as m:
        m.setattr(measure, "evaluate_tasks", count)
        assert call(argv) == 0
    assert len(asked) == 2 and asked[0] != asked[1], "the pruned model alone"
    assert report_of(tmp_path / "out")["tasks"]["stories"]["dense"]["acc"] == 1.0


@pytest.mark.parametrize(("name", "said"), [("zebra.yaml", "no such file"), ("", "pip install")])
def test_errors_come_before_any_work(
    name: str,
    said: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name:
        pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")
    else:  # without lm-eval
        for module in [
            m
            for m in sys.modules
            if m == "lm_eval" or m.startswith(("lm_eval.", "eval.tasks", "eval.harness"))
        ]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    monkeypatch.setattr(measure, "evaluate", fail)
    tasks = [f"--tasks={name or 'piqa'}", "--trust_task_files"]
    assert call([MODEL, *DATA, *METHOD, f"--output={tmp_path / 'out'}", *tasks]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: --tasks") and said in err[-1]
    assert not (tmp_path / "out").exists()


def test_task_files_need_trust(
    task: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [MODEL, *DATA, *METHOD, f"--output={tmp_path / 'out'}", f"--tasks={task}"]
    assert call(argv) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"error: --tasks={task} names task files, and these can run code")
    assert err.endswith("read them, then add --trust_task_files")


class Absent:
    """An import system in which lm-eval is not installed."""

    def find_spec(self, name: str, *rest: Any) -> None:
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
