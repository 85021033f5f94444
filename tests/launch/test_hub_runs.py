"""Whole commands with the hub: the real clients, in processes of their own."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from launch import evaluate, plan, prune
from launch.flags import cli
from reference.hub_datasets import add_dataset
from reference.local_hub import LocalHub

TINY = pathlib.Path(__file__).parents[2] / "models/embedded/tiny-llama"
TEXTS = [f"Once there was a kind girl who had {k} apples and a small boat. " * 4 for k in range(40)]
SMALL = ["--eval_data=wikitext2,c4,ptb", "--eval_length=16", "--eval_windows=2"]


@pytest.fixture
def stocked(local_hub: LocalHub) -> LocalHub:
    """Return a hub with a model, which is pushed to the revision v1, and all data sets."""
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    repository = local_hub.add("owner/name", {"README.md": b"the main branch has no model"})
    card = b"---\nlicense: mit\nlanguage: en\n---\n# A model\n"
    repository.commit({**files, "README.md": card, "LICENSE": b"terms"}, "v1")
    for name in ("wikitext2", "c4", "ptb"):
        add_dataset(local_hub, name, dict.fromkeys(("train", "test", "validation"), TEXTS))
    return local_hub


def run(command: str, arguments: list[str], environment: dict[str, str]) -> str:
    """Run a command, which must end well, and return what it writes to standard error."""
    words = [sys.executable, "-m", f"launch.{command}", *arguments]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.slow
def test_a_model_and_data_of_the_hub_are_pruned_and_uploaded_and_the_cache_serves_again(
    stocked: LocalHub, hub_environment: dict[str, str], tmp_path: pathlib.Path
) -> None:
    stocked.account("token", "me")
    stocked.xet = f"local://{tmp_path / 'xet'}"
    stocked.fail("GET /lfs", times=1)
    stocked.fail("POST /api/repos/create", times=1)
    output, environment = tmp_path / "out", hub_environment | {"HF_TOKEN": "token"}
    model = ["--model=owner/name", "--revision=v1"]
    printed = run(
        "prune",
        [
            *model,
            *SMALL,
            "--method=wanda",
            "--sparsity=0.5",
            "--calibration=c4",
            "--calibration_samples=2",
            "--calibration_length=16",
            "--push_to_hub=me/pruned",
            f"--output={output}",
        ],
        environment,
    )
    for name in ("owner/name", "Salesforce/wikitext", "allenai/c4", "ptb-text-only/ptb_text_only"):
        assert f"downloading {name}: " in printed
    assert printed.count("trying again") == 2
    assert f"uploaded: {stocked.url}/me/pruned" in printed
    report = json.loads((output / "pruning_report.json").read_text())
    commit = stocked.repositories["models", "owner/name"].refs["v1"]
    protocol = report["protocol"]
    assert protocol["model"] == {"repository": "owner/name", "commit": commit}
    assert len(protocol["calibration"]["commit"]) == 40
    assert all(len(data["commit"]) == 40 for data in protocol["evaluation"].values())
    card = ModelCard.load(output / "README.md").data
    assert (card.base_model, card.license, card.language) == ("owner/name", "mit", "en")
    pushed = stocked.repositories["models", "me/pruned"]
    arrived = pushed.commits[pushed.refs["main"]]
    assert pushed.private and set(arrived) >= {p.name for p in output.iterdir()}
    assert arrived["README.md"] == (output / "README.md").read_bytes()

    stocked.requests.clear()
    nowhere = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for cut_off in (environment | {"HF_HUB_OFFLINE": "1"}, nowhere):
        path = tmp_path / "evaluation.json"
        printed = run("evaluate", [*model, *SMALL, f"--json={path}"], cut_off)
        assert "downloading" not in printed and "trying again" not in printed
        again = json.loads(path.read_text())
        assert again["protocol"]["model"] == protocol["model"]
        assert again["protocol"]["evaluation"] == protocol["evaluation"]
        for name, scores in again["perplexity"].items():
            assert scores["dense"] == report["perplexity"][name]["dense"]
    assert not stocked.requests


@pytest.mark.slow
def test_the_hub_s_own_command_uploads_what_was_left(
    stocked: LocalHub, hub_environment: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """The command that the error of a failed upload names is one that `hf` takes."""
    stocked.account("token", "me")
    stocked.xet = f"local://{tmp_path / 'xet'}"
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    command = ["hf", "upload", "me/mine", str(tmp_path / "out"), ".", "--private"]
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = hub_environment | {"HF_TOKEN": "token", "PATH": path}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    repository = stocked.repositories["models", "me/mine"]
    assert repository.private
    assert repository.commits[repository.refs["main"]]["config.json"] == b"{}"


@pytest.mark.parametrize("command", ["prune", "evaluate", "generate", "bench", "plan", "sweep"])
def test_every_command_with_a_model_takes_a_revision(command: str) -> None:
    options = importlib.import_module(f"launch.{command}").options()
    assert options.parse(["--model=a/b", "--revision=v1"])["revision"] == "v1"


def test_a_plan_reads_the_configuration_of_a_revision(stocked: LocalHub) -> None:
    found = plan.config_of("owner/name@v1")
    assert found.config == json.loads((TINY / "config.json").read_text())
    commit = stocked.repositories["models", "owner/name"].refs["v1"]
    assert found.origin == {"model": {"repository": "owner/name", "commit": commit}}
    assert stocked.asked("HEAD") == 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--model=owner/gated"], "--model=owner/gated is gated on the hub: ask for access at"),
        (["--model=owner/none"], "--model=owner/none is no model of the hub, or a gated or priv"),
        (["--model=owner/name", "--revision=v9"], "--model=owner/name@v9 cannot be found, as"),
        (["--model=embedded:tiny-llama", "--revision=v1"], "--revision=v1 names a revision of"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    flags: list[str], error: str, stocked: LocalHub, capsys: pytest.CaptureFixture[str]
) -> None:
    stocked.add("owner/gated", {"model.safetensors": b"x"}).gated = frozenset()
    assert cli.run(evaluate.options(), evaluate.main, flags) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {error}") and printed.count("\n") == 1


def test_an_upload_without_a_token_is_refused_before_any_work(
    stocked: LocalHub, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model=owner/name@v1", "--push_to_hub=me/x", f"--output={tmp_path / 'out'}"]
    assert cli.run(prune.options(), prune.main, [*flags, "--sparsity=0.5"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(
        "error: --push_to_hub=me/x needs a token: log in with `hf auth login`"
    )
    assert not stocked.requests and not (tmp_path / "out").exists()
