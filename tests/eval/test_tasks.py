"""Tasks from local YAML files are found, checked and repeatable.

Those for the published data sets are lm-eval's own, word for word.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[tasks]'")

import datasets
import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks._yaml_loader import load_yaml

from eval import tasks as task_files
from eval.harness import HarnessModel
from eval.tasks import run_tasks
from launch.run.measure import tokenizer_of
from launch.run.tasks import vocabulary_of
from models.checkpoint.reader import open_checkpoint
from models.errors import InputError

pytestmark = [
    pytest.mark.slow,
    # datasets, torch and lm-eval warn about each other.
    pytest.mark.filterwarnings("ignore"),
]

open_tasks = functools.partial(task_files.open_tasks, trust_task_files=True)
YAMLS = pathlib.Path(__file__).parent / "tasks"
DOCUMENTS = int(
    os.environ.get("TOPIARY_TASK_DOCUMENTS", "4")
)  # of each task that SmolLM2 is compared on

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.5}}
"""


def write_task(
    folder: pathlib.Path,
    name: str = "pets",
    file: str = "data/pets.jsonl",
    more: str = "",
    documents: int = 7,
) -> pathlib.Path:
    """Write a YAML file, and its documents in a folder beside it."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": f"What is {i}?", "choices": ["a dog", "cat", "the bird"], "answer": i % 3}
        for i in range(documents)
    ]
    (folder / "data" / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(CHOICES.format(name=name, file=file) + more)
    return folder / f"{name}.yaml"


class Longest(LM):
    """Model that prefers longer continuations and remembers the requests."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked.append([r.args for r in requests])
        return [(float(len(r.args[1])), False) for r in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    generate_until = loglikelihood_rolling


def test_a_local_file_runs_on_the_data_beside_it(tmp_path: pathlib.Path) -> None:
    """The data lie beside the file, whatever the working directory; figures are counted by hand."""
    tasks = open_tasks([str(write_task(tmp_path))])
    facts = tasks.protocol["pets"]
    assert (facts["version"], facts["documents"], facts["num_fewshot"], len(facts["sha256"])) == (
        2.5,
        7,
        0,
        64,
    )
    found = run_tasks(tasks, Longest())
    right = np.asarray([i % 3 == 2 for i in range(7)], float)  # "the bird" is the longest
    assert found["pets"]["acc"] == pytest.approx(right.mean())
    assert found["pets"]["acc_stderr"] == pytest.approx(right.std(ddof=1) / 7**0.5)
    assert found["pets"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}


def test_directories_limits_and_several_files_select_tasks_and_documents(
    tmp_path: pathlib.Path,
) -> None:
    write_task(tmp_path), write_task(tmp_path, "_base"), write_task(tmp_path, "others")
    tasks = open_tasks([f"{tmp_path}/"], limit=3)
    assert {name: facts["documents"] for name, facts in tasks.protocol.items()} == {
        "pets": 3,
        "others": 3,
    }
    assert (
        open_tasks([str(tmp_path / "pets.yaml"), str(tmp_path / "others.yaml")], limit=3).protocol
        == tasks.protocol
    )
    lm = Longest()
    run_tasks(tasks, lm)
    assert len(lm.asked) == 1 and len(lm.asked[0]) == 2 * 3 * 3, "all tasks are asked together"


def test_examples_in_the_prompt_are_the_same_for_every_model(tmp_path: pathlib.Path) -> None:
    tasks, lm = open_tasks([str(write_task(tmp_path))], num_fewshot=2), Longest()
    assert tasks.protocol["pets"]["num_fewshot"] == 2
    first, second = run_tasks(tasks, lm), run_tasks(tasks, lm)
    assert lm.asked[0] == lm.asked[1] and first == second
    assert all(context.count("Q: ") == 3 for context, _ in lm.asked[0])


def test_a_task_that_says_no_examples_means_it(tmp_path: pathlib.Path) -> None:
    file = write_task(tmp_path, more="num_fewshot: 0\n")
    assert open_tasks([str(file)], num_fewshot=2).protocol["pets"]["num_fewshot"] == 0
    five = write_task(tmp_path, more="num_fewshot: 5\n")
    assert open_tasks([str(five)]).protocol["pets"]["num_fewshot"] == 5
    assert open_tasks([str(five)], num_fewshot=0).protocol["pets"]["num_fewshot"] == 0


def test_the_digest_depends_on_content_not_on_place(tmp_path: pathlib.Path) -> None:
    def sha(file: pathlib.Path) -> str:
        return open_tasks([str(file)]).protocol[file.stem]["sha256"]

    first = sha(write_task(tmp_path / "a"))
    assert sha(write_task(tmp_path / "b", "renamed")) == first
    assert sha(write_task(tmp_path / "c", documents=8)) != first


def test_a_file_that_is_not_trusted_runs_nothing(tmp_path: pathlib.Path) -> None:
    """A template reaches every module, `!function` names one: both need no more than opening."""
    target = tmp_path / "ran"
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {target}') }}}}"
    file = write_task(tmp_path, more=f'doc_to_target: "{attack}"\n')
    for name in (file, f"{tmp_path}/"):
        with pytest.raises(InputError, match=r"can run code.*then add trust_task_files"):
            task_files.open_tasks(["piqa", str(name)])
    assert not target.exists()
    with contextlib.suppress(InputError):
        open_tasks([str(file)])
    assert target.exists(), "the reason for the refusal is gone"


BAD = {
    "no file": (lambda d: d / "none.yaml", "no such file"),
    "no directory": (lambda d: f"{d}/none/", "no such file"),
    "nothing there": (lambda d: f"{d}/", "has no .yaml file"),
    "no data": (lambda d: write_task(d, file="data/none.jsonl"), "cannot be opened"),
    "no name": (lambda d: write_text(d, "dataset_path: json\n"), "has no `task:`"),
    "a group": (lambda d: write_text(d, "group: x\ntask: [pets]\n"), "is a group"),
    "not YAML": (lambda d: write_text(d, "task: [\n"), "cannot be opened"),
    "no such field": (
        lambda d: write_task(d, more='doc_to_target: "{{none.index(1)}}"\n'),
        "cannot be",
    ),
    "settings of another engine": (
        lambda d: write_task(
            d, more="output_type: generate_until\ngeneration_kwargs: {num_beams: 4}\n"
        ),
        "generate with num_beams: that is not supported",
    ),
    "code": (lambda d: write_task(d, more="unsafe_code: true\n"), "runs code"),
}


def write_text(folder: pathlib.Path, text: str) -> pathlib.Path:
    (folder / "t.yaml").write_text(text)
    return folder / "t.yaml"


@pytest.mark.parametrize("case", BAD)
def test_a_task_that_cannot_be_opened_is_refused(
    case: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, said = BAD[case]
    with pytest.raises(InputError, match=said):
        open_tasks([str(make(tmp_path))])
    assert capfd.readouterr() == ("", ""), "the harness is quiet"
    assert not datasets.are_progress_bars_disabled() and "DISABLE_MULTIPROC" not in os.environ


def test_unknown_names_and_an_unreachable_hub_are_reported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both concern lm-eval's own tasks, and the hub is not waited for."""
    with pytest.raises(InputError, match="no such task"):
        open_tasks(["zebra_task"])
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"piqa cannot be opened \(no network\)"):
        open_tasks(["piqa"])
    assert capfd.readouterr() == ("", "")


def fail(*args: Any, **more: Any) -> None:
    logging.getLogger("huggingface_hub.utils").error("Retrying")
    raise ConnectionError("no network\nand more lines")


OWN = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "rte": "glue/rte/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
}
WORDED = {  # fields that the local files have under other names, or as another type
    "boolq": {"doc_to_target": "{{answer | int}}"},
    "lambada": {"doc_to_text": "{{context}}", "doc_to_target": "{{' ' + continuation}}"},
}


@pytest.mark.parametrize("name", OWN)
def test_local_tasks_are_lm_evals_own(name: str) -> None:
    ours = load_yaml(YAMLS / f"{name}.yaml")
    theirs = load_yaml(pathlib.Path(lm_eval.__file__).parent / "tasks" / OWN[name])
    for key in (
        "output_type",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "process_docs",
        "target_delimiter",
        "metadata",
    ):
        expected = WORDED.get(name, {}).get(key, theirs.get(key))
        got = ours.get(key)
        assert (
            (got.__code__.co_code == expected.__code__.co_code)
            if callable(got)
            else got == expected
        ), key
    assert [m["metric"] for m in ours["metric_list"]] == [
        m["metric"] for m in theirs["metric_list"]
    ]


@pytest.mark.parametrize("name", OWN)
def test_figures_of_smollm2_equal_lm_evals_own(name: str, smollm2: pathlib.Path) -> None:
    """Compare with lm-eval's Hugging Face model on the first DOCUMENTS of each data set."""
    for package in ("torch", "accelerate"):
        pytest.importorskip(package, reason=f"lm-eval's own model needs {package}")
    tasks = open_tasks([str(YAMLS / f"{name}.yaml")], limit=DOCUMENTS)
    checkpoint = open_checkpoint(smollm2)
    vocabulary = vocabulary_of(checkpoint, tokenizer_of(checkpoint)())
    ours = HarnessModel(
        checkpoint.model, vocabulary, longest=checkpoint.config["max_position_embeddings"]
    )
    (figures, answers), (expected, reference) = (
        answered(tasks, lm) for lm in (ours, hugging_face(smollm2))
    )
    difference = max(abs(a - b) for (a, _), (b, _) in zip(answers, reference, strict=True))
    print(
        f"{name}: {len(answers)} requests, largest difference {difference:.1e}; "
        f"ours {figures}, theirs {expected}"
    )
    assert difference < 1e-3
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in reference]
    assert {k: v for k, v in figures.items() if k.startswith("acc")} == {
        k: v for k, v in expected.items() if k.startswith("acc")
    }


_MODELS: dict[pathlib.Path, Any] = {}


def hugging_face(directory: pathlib.Path) -> LM:
    """Return lm-eval's own model, loaded once.

    Its softmax is in float64. torch's in float32 is off by 8e-6 a token on a CPU, which over the
    150 tokens of PIQA's longest answers is more than 1e-3. Ours is within 1e-4 of the whole model
    in float64 there.
    """
    from lm_eval.models.huggingface import HFLM

    if directory not in _MODELS:
        _MODELS[directory] = HFLM(
            pretrained=str(directory),
            dtype="float32",
            device="cpu",
            batch_size=8,
            softmax_dtype="float64",
        )
    return _MODELS[directory]


def answered(tasks: Any, lm: Any) -> tuple[dict[str, Any], list[tuple[float, bool]]]:
    """Return the figures of a single task, and all its answers."""
    (figures,) = run_tasks(tasks, lm).values()
    (task,) = tasks.loaded["tasks"].values()
    return figures, [r.resps[0] for r in task.instances]
