"""The model card: metadata that the hub takes, figures with their protocol, no local path."""

import copy
import pathlib
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

from launch.run import card
from models.checkpoint.hub_client import Source
from reference.local_hub import card_errors

COMMIT = "0123456789" * 4
REPORT: dict[str, Any] = {
    "model": "/home/someone/models/llama",
    "method": 'flap(metric="WIFN")',
    "command": "python -m launch.prune --model=/home/someone/models/llama --revision=v1 "
    "--method='flap(metric=\"WIFN\")' --sparsity=0.5 --eval_data=~/data/a.txt,ptb "
    "--calibration=/data/calib.npy --output=/tmp/out --push_to_hub=me/mine",
    "settings": {
        "push_to_hub": "",
        "pattern": "2:4",
        "allocation": "uniform",
        "refine": "none",
        "seed": 3,
        "dtype": "float32",
    },
    "protocol": {
        "calibration": {
            "source": "/data/calib.npy",
            "sha256": "a" * 64,
            "samples": 4,
            "length": 32,
        },
        "evaluation": {
            "~/data/a.txt": {
                "source": "~/data/a.txt",
                "dataset": "a.txt",
                "cut": "consecutive windows",
                "sha256": "b" * 64,
                "samples": 2,
                "length": 16,
            },
            "ptb": {
                "source": "ptb",
                "dataset": "ptb-text-only/ptb_text_only",
                "commit": COMMIT,
                "split": "test",
                "cut": "consecutive windows",
                "sha256": "c" * 64,
                "samples": 9,
                "length": 16,
            },
        },
        "tasks": {"/home/someone/my_task.yaml": {}},
        "versions": {"jax": "0.10", "python": "3.12"},
        "device": {"count": 1, "kind": "cpu"},
    },
    "sparsity": {"target": 0.5, "prunable": 0.5, "total": 0.4},
    "parameters": {"dense": 10, "pruned": 6},
    "bytes": {"dense": 40, "pruned": 24},
    "perplexity": {
        "~/data/a.txt": {"dense": 10.0, "pruned": 12.0, "tokens": 30},
        "ptb": {"dense": 20.0, "pruned": 22.0, "tokens": 135},
    },
    "tasks": {},
    "loads_as": "stock llama",
}


def written(
    tmp_path: pathlib.Path, source: pathlib.Path, report: dict[str, Any] = REPORT
) -> tuple[dict[str, Any], str]:
    """Return the metadata of a card as huggingface_hub reads it, and its text."""
    card.write_card(tmp_path, report, source)
    path = tmp_path / "README.md"
    text = path.read_text(encoding="utf-8")
    assert card_errors(text) == []
    assert metadata_load(path) == ModelCard.load(path).data.to_dict()
    return ModelCard.load(path).data.to_dict(), text


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return the directory of a model that the hub's cache holds."""
    path = tmp_path / f"hub/models--owner--name/snapshots/{COMMIT}"
    path.mkdir(parents=True)
    return path


def test_the_card_says_where_the_model_comes_from(
    tmp_path: pathlib.Path, source: pathlib.Path
) -> None:
    (source / "README.md").write_text(
        "---\nlicense: llama2\nlanguage:\n- en\n- de\ntags: [x]\ndatasets: y\n---\n# A model\n"
    )
    data, text = written(tmp_path, source)
    assert data == {
        "base_model": "owner/name",
        "license": "llama2",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["topiary", "pruned", "flap"],
    }
    assert "# name, pruned by flap" in text
    assert f"[owner/name](https://huggingface.co/owner/name) at commit `{COMMIT}`" in text
    assert f"--model=owner/name@{COMMIT}" in text and "--revision" not in text


def test_figures_stand_with_their_protocol(tmp_path: pathlib.Path, source: pathlib.Path) -> None:
    _, text = written(tmp_path, source)
    assert "| Perplexity, a.txt | 10.000 | 12.000 | 1.200x |" in text
    assert (
        f"- ptb: ptb-text-only/ptb_text_only at commit `{COMMIT}`, test, 9 windows of 16 tokens "
        "(consecutive windows)" in text
    )
    assert "- Calibration: calib.npy, 4 windows of 32 tokens" in text
    assert "- Pattern: `2:4`" in text and "Allocation" not in text


def test_no_path_of_the_machine_is_in_the_card(
    tmp_path: pathlib.Path, source: pathlib.Path
) -> None:
    for origin in (source, tmp_path):
        _, text = written(tmp_path, origin)
        for part in ("someone", "/tmp", "~", "/data", str(tmp_path)):
            assert part not in text
    assert (
        "python -m launch.prune --model=llama '--method=flap(metric=\"WIFN\")' --sparsity=0.5 "
        "--eval_data=a.txt,ptb --calibration=calib.npy --output=OUTPUT\n" in text
    )


def test_the_snippet_is_five_lines_and_names_the_repository(
    tmp_path: pathlib.Path, source: pathlib.Path
) -> None:
    report = copy.deepcopy(REPORT)
    report["settings"]["push_to_hub"] = "me/mine"
    report["loads_as"] = "topiary_llama, a class that ships with it (trust_remote_code=True)"
    _, text = written(tmp_path, source, report)
    code = text.split("```python\n")[1].split("\n```")[0]
    assert len(code.splitlines()) == 5
    assert 'from_pretrained("me/mine", trust_remote_code=True)' in code
    compile(code, "card", "exec")


def test_a_licence_without_a_card_is_linked(tmp_path: pathlib.Path) -> None:
    (tmp_path / "LICENSE.txt").touch()
    source = tmp_path / "model"
    source.mkdir()
    data, _ = written(tmp_path, source)
    assert (data["license"], data["license_link"]) == ("other", "LICENSE.txt")
    assert "base_model" not in data and "language" not in data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no metadata",
        b"\xff\xfe---\nlicense: mit\n---\n",
        b"---\n- a list\n---\n",
        b"---\nlicense: [unclosed\n---\n",
        b"---\nlicense: {nested: true}\nlanguage: 3\nbase_model: /home/someone/x\n---\n",
        b"---\nlicense: [no]\nlanguage: [en, no]\nbase_model: [../x]\n---\n",  # no is False
        b"---\n" + b"[" * 400 + b"\n---\n",
    ],
)
def test_an_odd_card_of_the_source_costs_nothing(
    content: bytes, tmp_path: pathlib.Path, source: pathlib.Path
) -> None:
    (source / "README.md").write_bytes(content)
    data, _ = written(tmp_path, source)
    assert data["base_model"] == "owner/name" and "license" not in data


def test_a_model_pruned_again_keeps_the_base_of_its_card(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "pruned once"
    source.mkdir()
    (source / "README.md").write_text("---\nbase_model: owner/name\nlicense: mit\n---\n")
    data, _ = written(tmp_path, source)
    assert (data["base_model"], data["license"]) == ("owner/name", "mit")


@pytest.mark.parametrize(
    ("word", "public"),
    [
        ("--tasks=piqa,/home/x/t.yaml", "--tasks=piqa,t.yaml"),
        ("--model=../models/llama/", "--model=llama"),
        ("--model=embedded:tiny-llama", "--model=embedded:tiny-llama"),
        ("--noresume", "--noresume"),
        ("--calibration=/home/x/a.txt:0.5,c4:0.5", "--calibration=a.txt:0.5,c4:0.5"),
        (
            """'--calibration=self(prompts="/home/x/p.txt"):1,/home/x/t.npy:1'""",
            """'--calibration=self(prompts="p.txt"):1,t.npy:1'""",
        ),
        ("--method=wanda", "--method=wanda"),
    ],
)
def test_a_word_of_a_command_loses_its_path(word: str, public: str) -> None:
    assert card.public_command(f"python -m launch.prune {word}", None).endswith(public)


def test_the_origin_takes_the_place_of_the_name() -> None:
    command = "python -m launch.prune --model=owner/name@main --revision=main --seed=1"
    assert card.public_command(command, Source("owner/name", COMMIT)) == (
        f"python -m launch.prune --model=owner/name@{COMMIT} --seed=1"
    )
