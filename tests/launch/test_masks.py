"""`launch.masks` says which zeros fine-tuning lost, with an exit code, and puts them back."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch import masks
from launch.flags.cli import run
from reference import tiny
from reference.local_hub import LocalHub

CONFIG = {**tiny.GQA, "num_hidden_layers": 1}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def models(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Write `pruned`, half of whose linears is zero, and `tuned`, which lost 30 of the zeros."""
    monkeypatch.chdir(tmp_path)
    state = tiny.state_of(CONFIG, tiny.random_model(CONFIG))
    state = {n: x * (np.arange(x.size) % 2 < 1).reshape(x.shape) for n, x in state.items()}
    tiny.write(tmp_path / "pruned", state, CONFIG)
    state[f"{UP}.weight"].flat[:60] = 1
    tiny.write(tmp_path / "tuned", state, CONFIG)
    return tmp_path


def command(*flags: str) -> int:
    return run(masks.options(), masks.main, ["--model=pruned", *flags])


def test_the_exit_code_says_whether_zeros_are_lost(
    models: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--check=pruned") == 0
    assert capsys.readouterr().out == "0 of 7 linears lost zeros: 0 of 3,456\n"
    assert command("--check=tuned", "--json=report.json") == 1
    said = capsys.readouterr().out
    rows = [" ".join(line.replace("│", " ").split()) for line in said.splitlines()]
    assert f"{UP} 50.00% 47.66% 30" in rows and "all linears 50.00% 49.57% 30" in rows
    assert rows[-1] == "1 of 7 linears lost zeros: 30 of 3,456" and "q_proj" not in said
    report = json.loads((models / "report.json").read_text())
    assert report["lost"] == 30 and report["per_linear"][UP] == {
        "entries": 1280,
        "zeros": {"pruned": 640, "finetuned": 610},
        "sparsity": {"pruned": 0.5, "finetuned": 610 / 1280},
        "lost": 30,
    }
    assert len(report["per_linear"]) == 7 and report["output"] is None


def test_apply_writes_a_model_that_passes_the_check(
    models: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "pruned" / "pruning.json").write_text('{"format": 1}')
    assert command("--check=tuned", "--apply", "--output=out") == 0
    assert capsys.readouterr().out.endswith("\nmodel with the zeros put back: out\n")
    assert (models / "out" / "pruning.json").read_text() == '{"format": 1}'
    assert command("--check=out") == 0
    before, after = (load_file(models / d / "model.safetensors") for d in ("pruned", "out"))
    assert (after[f"{UP}.weight"] == 0).sum() == (before[f"{UP}.weight"] == 0).sum()
    assert {p.name for p in models.iterdir()} == {"pruned", "tuned", "out"}


def test_a_model_without_zeros_is_warned_about(
    models: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tiny.state_of(CONFIG, tiny.random_model(CONFIG))
    tiny.write(models / "pruned", state, CONFIG)
    assert command("--check=tuned") == 0
    assert "warning: the pruned model has no zeros in its linears" in capsys.readouterr().err


def test_an_error_is_one_line_and_leaves_nothing(
    models: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = models / "tuned/model.safetensors"
    whole = load_file(file)
    cases = {
        (): "--check is missing: give a directory or hub id",
        ("--check=absent",): "--check=absent is no such directory or file, and not a hub id",
        ("--check=tuned", "--output=out"): "--output does nothing without --apply: give both",
        ("--check=tuned", "--apply"): "--output is missing: give the directory to write",
        ("--check=tuned", "--apply", "--output=pruned"): "--output=pruned exists and is not",
        ("--check=tuned", "--apply", "--output=out", "--json=no/x.json"): "--json=no/x.json cannot",
    }
    for flags, says in cases.items():
        assert command(*flags) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {says}")
    save_file({n: x for n, x in whole.items() if n != f"{UP}.weight"}, file)
    assert command("--check=tuned", "--apply", "--output=out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: tuned has no tensor {UP}.weight: ") and error.count("\n") == 1
    assert {p.name for p in models.iterdir()} == {"pruned", "tuned"}


@pytest.mark.slow
def test_an_adapter_of_the_hub_is_checked(models: pathlib.Path, local_hub: LocalHub) -> None:
    factors = {"A": np.ones((2, 32), np.float32), "B": np.ones((40, 2), np.float32)}
    named = {f"base_model.model.{UP}.lora_{k}.weight": x for k, x in factors.items()}
    save_file(named, models / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 1}
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": (models / "adapter_model.safetensors").read_bytes(),
    }
    local_hub.add("anna/adapter", files)
    assert command("--check=anna/adapter", "--json=report.json") == 1
    assert json.loads((models / "report.json").read_text())["lost"] == 640
    assert command("--check=anna/adapter", "--apply", "--output=out") == 0
    assert command("--check=out") == 0
