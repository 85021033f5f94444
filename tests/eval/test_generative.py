"""Tasks whose answers are generated, by name and by local YAML, against lm-eval's own model."""

import builtins
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[tasks]'")

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks._yaml_loader import load_yaml

from eval import harness
from eval.answers import AnswerCache
from eval.harness import HarnessModel
from eval.tasks import open_tasks, run_tasks
from launch.report import summary
from launch.run.measure import tokenizer_of
from launch.run.tasks import vocabulary_of
from models.checkpoint.hub import resolve
from models.checkpoint.reader import Checkpoint, in_memory, open_checkpoint
from models.errors import InputError

pytestmark = [
    pytest.mark.slow,
    # datasets, torch and lm-eval warn about each other.
    pytest.mark.filterwarnings("ignore"),
]
YAMLS = pathlib.Path(__file__).parent / "tasks"
LONGEST = 2048  # positions of the model turn, so it reads longer texts than its own
DATA = {"openai/gsm8k": ("gsm8k", ("train", "test")), "google/IFEval": ("ifeval", ("train",))}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    found = open_checkpoint(resolve("embedded:tiny-llama"))
    return found._replace(model=in_memory(found.model))


def adapter(checkpoint: Checkpoint, **settings: Any) -> HarnessModel:
    vocabulary = vocabulary_of(checkpoint, tokenizer_of(checkpoint)())
    return HarnessModel(checkpoint.model, vocabulary, longest=LONGEST, **settings)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub whose data sets are the local files."""
    real = datasets.load_dataset

    def load(path: str, *args: Any, **more: Any) -> Any:
        if path not in DATA:
            return real(path, *args, **more)
        name, splits = DATA[path]
        files = {split: str(YAMLS / f"{name}.jsonl") for split in splits}
        return real("json", data_files=files)

    monkeypatch.setattr(datasets, "load_dataset", load)


def needs(name: str) -> None:
    for package in ("langdetect", "immutabledict", "nltk") if name == "ifeval" else ():
        pytest.importorskip(package, reason=f"ifeval needs {package}: pip install lm-eval[ifeval]")


@pytest.mark.parametrize("name", ["gsm8k", "ifeval"])
def test_local_files_are_lm_evals_own(name: str) -> None:
    needs(name)
    ours = load_yaml(YAMLS / f"{name}.yaml")
    theirs = load_yaml(pathlib.Path(lm_eval.__file__).parent / "tasks" / name / f"{name}.yaml")
    local = {"task", "dataset_path", "dataset_kwargs", "dataset_name", "tag"}

    def plain(value: Any) -> Any:
        """Return a value with functions by their code, as each file loads them anew."""
        if isinstance(value, Mapping):
            return {key: plain(x) for key, x in value.items()}
        if isinstance(value, list):
            return [plain(x) for x in value]
        return value.__code__.co_code if callable(value) else value

    assert {k: plain(v) for k, v in ours.items() if k not in local} == {
        k: plain(v) for k, v in theirs.items() if k not in local
    }


@pytest.mark.parametrize("name", ["gsm8k", "ifeval"])
def test_figures_by_name_and_by_file_equal_lm_evals_own(
    name: str,
    checkpoint: Checkpoint,
    hub: None,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In batches of several prompts, where lm-eval's model reads each alone."""
    needs(name)
    for package in ("torch", "accelerate"):
        pytest.importorskip(package, reason=f"lm-eval's own model needs {package}")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(
        pretrained=str(checkpoint.directory), dtype="float32", device="cpu", max_length=LONGEST
    )
    file = str(YAMLS / f"{name}.yaml")
    tasks = open_tasks([file], limit=2, num_fewshot=1, trust_task_files=True)
    ours = adapter(checkpoint, batch=2, answers=AnswerCache(tmp_path, {}))
    figures = run_tasks(tasks, ours)[f"{name}_local"]
    assert figures == run_tasks(tasks, theirs)[f"{name}_local"]
    named = open_tasks([name], limit=2, num_fewshot=1)
    # The requests are the same, so their answers are in the cache.
    monkeypatch.setattr(harness, "generate", None)
    assert run_tasks(named, ours)[name] == figures
    digests = [t.protocol[n]["sha256"] for t, n in ((tasks, f"{name}_local"), (named, name))]
    assert digests[0] == digests[1]
    report = {name: {"dense": figures, "pruned": figures}}
    assert summary.metrics(report) and all(m.fraction for m in summary.metrics(report))


def test_answers_are_generated_in_one_batch_and_once(
    checkpoint: Checkpoint, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(YAMLS / "gsm8k.yaml")
    tasks = open_tasks([file], limit=3, num_fewshot=1, trust_task_files=True)
    calls: list[tuple[int, ...]] = []
    real = harness.generate

    def counted(model: Any, prompts: Any, *args: Any, **more: Any) -> np.ndarray:
        calls.append(prompts.shape)
        return real(model, prompts, *args, **more)

    monkeypatch.setattr(harness, "generate", counted)
    first, again = (
        run_tasks(tasks, adapter(checkpoint, batch=4, answers=AnswerCache(tmp_path, {})))
        for _ in range(2)
    )
    assert first == again and [shape[0] for shape in calls] == [4]


def test_a_text_ends_soon_after_one_of_its_stops(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the 256 tokens that a task may ask for; the texts are those of whole answers."""
    made: list[int] = []
    real = harness.generate

    def counted(*args: Any, **more: Any) -> np.ndarray:
        out = real(*args, **more)
        made.append(out.shape[1])
        return out

    settings = {"until": ["."], "max_gen_toks": 256}
    prompts = ("Once there was a girl named Lucy. One day", "The dog", "She looked at the sea and")
    requests = [
        Instance("generate_until", {}, (p, settings), i, ("task", i, 1))
        for i, p in enumerate(prompts)
    ]
    monkeypatch.setattr(harness, "generate", counted)
    stopped = adapter(checkpoint, batch=4).generate_until(requests)
    monkeypatch.setattr(harness, "generate", lambda *a, stop, **more: real(*a, **more))
    assert adapter(checkpoint, batch=4).generate_until(requests) == stopped
    assert made and max(made) < 256


def test_a_task_whose_packages_are_missing_names_them(
    hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **more: Any) -> Any:
        if name == "langdetect":
            raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")
        return real(name, *args, **more)

    for module in [m for m in sys.modules if m.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"langdetect.*lm-eval\[ifeval\]"):
        open_tasks(["ifeval"])
