"""`launch.generate` continues texts, and the report has samples of both models."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from calibration.tokenizer import load_tokenizer
from launch import generate, prune
from launch.flags.cli import run
from launch.run import samples
from models.checkpoint.hub import resolve
from models.checkpoint.reader import open_checkpoint
from models.generate import generate as continue_tokens
from reference import tiny

pytestmark = pytest.mark.slow

PROMPT = "Once there was a kind girl"


def call(*args: str) -> int:
    return run(generate.options(), generate.main, list(args))


def test_the_prompt_and_its_continuation_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--model=embedded:tiny-llama", f"--prompt={PROMPT}", "--new_tokens=8") == 0
    checkpoint = open_checkpoint(resolve("embedded:tiny-llama"))
    tokenizer = load_tokenizer(checkpoint.directory)
    ids = tokenizer(PROMPT, special=True)
    new = continue_tokens(checkpoint.model, np.asarray([ids]), 8)[0]
    assert capsys.readouterr().out == PROMPT + tokenizer.continuation(ids, new.tolist()) + "\n"


def test_equal_seeds_give_equal_texts(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        argv = [
            "--model=embedded:tiny-opt",
            f"--prompt={PROMPT}",
            "--new_tokens=12",
            "--temperature=1.5",
            "--top_p=0.95",
        ]
        assert call(*argv, f"--seed={seed}") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_mesh_gives_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model=embedded:tiny-llama", f"--prompt={PROMPT}", "--new_tokens=8"]
    assert call(*argv) == 0
    one = capsys.readouterr().out
    assert call(*argv, "--mesh=model=2") == 0
    assert capsys.readouterr().out == one


BAD = {
    "no prompt": ([], "--prompt is missing"),
    "no model": (["--model=", "--prompt=a"], "--model is missing"),
    "temperature": (["--prompt=a", "--temperature=-1"], "--temperature"),
    "nucleus": (["--prompt=a", "--top_p=0"], "--top_p"),
    "no new token": (["--prompt=a", "--new_tokens=0"], "--new_tokens"),
    "too long": (["--model=embedded:tiny-opt", "--prompt=a", "--new_tokens=100000"], "positions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, message = BAD[name]
    assert call("--model=embedded:tiny-llama", *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and message in error and error.count("\n") == 1


def test_a_text_ends_where_the_checkpoint_says(tmp_path: Path) -> None:
    """`generation_config.json` first, one token or several; else `config.json`; else nowhere."""
    tiny.write(tmp_path, tiny.state_of(tiny.GQA, tiny.random_model(tiny.GQA)))
    checkpoint = open_checkpoint(tmp_path)
    assert generate.eos_tokens(checkpoint) == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert generate.eos_tokens(checkpoint) == [3, 4]
    (tmp_path / "generation_config.json").write_text("{}")
    assert generate.eos_tokens(checkpoint._replace(config={})) == []


def test_the_text_stops_before_the_token_that_ends_it() -> None:
    tokenizer = load_tokenizer(resolve("embedded:tiny-llama"))
    ids = tokenizer(PROMPT + " named Lucy")
    prompt, new = ids[:4], np.asarray([*ids[4:], 1, 5, 5])
    assert (
        generate.continuation(tokenizer, prompt, new, [1])
        == tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :]
    )


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt"])
def test_the_report_has_samples_of_both_models(model: str, tmp_path: Path) -> None:
    argv = [
        f"--model=embedded:{model}",
        "--sparsity=0.5",
        "--calibration_samples=4",
        "--calibration_length=32",
        "--eval_windows=1",
    ]
    assert (
        run(
            prune.options(), prune.main, [*argv, "--eval_length=32", f"--output={tmp_path / 'out'}"]
        )
        == 0
    )
    found = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["samples"]
    assert [set(s) for s in found] == [{"prompt", "dense", "pruned"}] * 2
    page = (tmp_path / "out" / "report.html").read_text()
    tokenizer = load_tokenizer(tmp_path / "out")
    length = len(tokenizer(found[0]["prompt"], special=True))
    for sample, whole in zip(found, samples.PROMPTS, strict=True):
        assert (
            whole.startswith(sample["prompt"].strip())
            and len(tokenizer(sample["prompt"], special=True)) == length
        )
        assert sample["prompt"] in page
    for name, directory in (("dense", resolve(f"embedded:{model}")), ("pruned", tmp_path / "out")):
        checkpoint = open_checkpoint(directory)
        prompts = np.asarray([tokenizer(s["prompt"], special=True) for s in found])
        new = continue_tokens(checkpoint.model, prompts, samples.NEW_TOKENS)
        eos = generate.eos_tokens(checkpoint)
        for sample, ids, text in zip(found, prompts.tolist(), new, strict=True):
            assert sample[name] == generate.continuation(tokenizer, ids, text, eos)
    assert any(s["dense"] != s["pruned"] for s in found)


def test_there_are_no_samples_without_tokenizer_positions_or_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tokenizer, one of another model, too few positions, a model too large to hold."""
    embedded = resolve("embedded:tiny-opt")
    dense, tokenizer = open_checkpoint(embedded), load_tokenizer(embedded)
    bare = open_checkpoint(
        tiny.write(tmp_path, tiny.state_of(tiny.GQA, tiny.random_model(tiny.GQA)))
    )
    assert samples.samples(bare, bare, lambda: load_tokenizer(tmp_path), {}) == ([], {})
    short = jax.tree.map(lambda x: x, dense.model.arch.config)
    few = dense._replace(
        model=dense.model._replace(
            arch=dense.model.arch._replace(config=type(short)(**vars(short) | {"positions": 40}))
        )
    )
    assert samples.samples(few, few, lambda: tokenizer, {}) == ([], {})
    monkeypatch.setattr(samples, "fits_in_memory", lambda size: size < 100)
    assert samples.samples(dense, dense, lambda: tokenizer, {}) == ([], {})
