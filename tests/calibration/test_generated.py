"""Windows that the model writes: greedy ones are transformers', draws follow softmax, and keep."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from calibration import generated
from calibration.data import Tokens
from calibration.generated import SelfText, generated_windows, memory_needed, self_text
from calibration.mixtures import mixed_windows, parse_parts
from calibration.special_tokens import start_token
from calibration.tokenizer import load_tokenizer
from calibration.window_cache import cache_directory
from models.arch import logits
from models.checkpoint.reader import Checkpoint, open_checkpoint
from models.errors import InputError
from models.sharding import make_mesh
from reference import tiny, tiny_tokenizer, torch_models

LENGTH = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Use an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_directory()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a small checkpoint with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    model = tiny.random_model(tiny.GQA)
    tiny.write(root / "gqa", tiny.state_of(tiny.GQA, model), tiny.GQA)
    tiny_tokenizer.write(root / "gqa")
    return root / "gqa"


@pytest.fixture(scope="module")
def checkpoint(directory: pathlib.Path) -> Checkpoint:
    """Return the checkpoint, opened."""
    return open_checkpoint(directory)


@pytest.fixture
def prompts(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a file of documents of which some have three tokens and more."""
    words = ["in the in the", "a", "!", "the hat", "b c d e", "in", "f g h", "i the j", "kl mn op"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    return file


def write(checkpoint: Checkpoint, settings: SelfText | None = None, **changes: Any) -> Tokens:
    """Let the model write a few windows."""
    options = {"samples": 5, "length": LENGTH, "seed": 0} | changes
    tokenizer = load_tokenizer(checkpoint.directory)
    return generated_windows(settings or self_text(), checkpoint, lambda: tokenizer, **options)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model would write."""

    def fail(*arguments: Any, **options: Any) -> np.ndarray:
        raise AssertionError("the windows are on the disk")

    monkeypatch.setattr(generated, "generate", fail)


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note every batch that a model writes."""
    written: list[int] = []
    inner = generated.generate

    def noted(*arguments: Any, **options: Any) -> np.ndarray:
        written.append(1)
        return inner(*arguments, **options)

    monkeypatch.setattr(generated, "generate", noted)
    return written


# --- What is written.


@pytest.mark.slow
def test_greedy_windows_are_those_of_transformers(
    directory: pathlib.Path, checkpoint: Checkpoint, prompts: pathlib.Path
) -> None:
    reference = torch_models.load(directory)
    for temperature in (0, 1e-3):
        settings = self_text(temperature, prompts=str(prompts), prompt_tokens=3)
        ids = write(checkpoint, settings).ids
        assert (ids[:, 0] == 1).all()
        np.testing.assert_array_equal(
            ids[:, 4:], torch_models.greedy(reference, ids[:, :4], LENGTH - 4)
        )


def test_prompts_are_the_first_tokens_of_documents(
    checkpoint: Checkpoint, prompts: pathlib.Path
) -> None:
    tokenizer = tiny_tokenizer.tokenizer()
    texts = [json.loads(line)["text"] for line in prompts.read_text().splitlines()]
    long = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    expected = {tuple(ids[:3]) for ids in long if len(ids) >= 3}
    ours = write(checkpoint, self_text(prompts=str(prompts), prompt_tokens=3))
    found = {tuple(row[1:4]) for row in ours.ids.tolist()}
    assert len(found) == 5 and found <= expected
    record = ours.protocol["prompts"]
    assert (record["dataset"], record["tokens"]) == ("prompts.jsonl", 3)
    many = write(checkpoint, self_text(prompts=str(prompts), prompt_tokens=3), samples=20)
    assert {tuple(row[1:4]) for row in many.ids.tolist()} == expected
    assert f"begin with {len(expected)} prompts" in many.warnings[0]


def test_lines_of_a_text_are_its_documents(checkpoint: Checkpoint, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("abcd\n\nefgh\nij\nklmn\nopqr\nstuv\n")
    ids = write(checkpoint, self_text(prompts=str(tmp_path / "a.txt"), prompt_tokens=4)).ids
    texts = {tiny_tokenizer.tokenizer().decode(row[1:5]) for row in ids.tolist()}
    assert texts == {"abcd", "efgh", "klmn", "opqr", "stuv"}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_draws_follow_the_softmax_of_the_model(
    checkpoint: Checkpoint, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chi-square of the first drawn tokens against NumPy's softmax."""
    monkeypatch.setattr(generated, "BATCH", 4096)
    count = 4 * 4096
    drawn = write(checkpoint, self_text(temperature), samples=count, length=2).ids[:, 1]
    model = checkpoint.model._replace(blocks=tuple(checkpoint.model.blocks))
    z = np.asarray(logits(model, np.array([[1]], np.int32)), np.float64)[0, 0] / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    often = p * count >= 5
    seen = np.bincount(drawn, minlength=tiny.VOCAB)
    observed = np.append(seen[often], seen[~often].sum())
    expected = np.append(p[often], p[~often].sum()) * count
    chi = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    freedom = len(expected) - 1
    # Mean and standard deviation of the distribution: five of them away is no chance.
    assert freedom > 10 and chi < freedom + 5 * np.sqrt(2 * freedom)


def test_top_p_leaves_out_the_tail(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "BATCH", 512)
    drawn = write(checkpoint, self_text(top_p=0.5), samples=512, length=2).ids[:, 1]
    model = checkpoint.model._replace(blocks=tuple(checkpoint.model.blocks))
    z = np.asarray(logits(model, np.array([[1]], np.int32)), np.float64)[0, 0]
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), 0.5)) + 1
    assert set(drawn.tolist()) <= set(order[:size].tolist())


def test_the_seed_decides_and_windows_differ(checkpoint: Checkpoint) -> None:
    one, again, two = (write(checkpoint, seed=seed, samples=20) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.ids, again.ids)
    assert one.protocol == again.protocol
    assert len(np.unique(np.concatenate([one.ids, two.ids]), axis=0)) == 40


def test_a_text_goes_on_behind_its_end(checkpoint: Checkpoint) -> None:
    ids = write(checkpoint, self_text(3.0), samples=40, length=40).ids
    behind = [row[np.flatnonzero(row == 2)[0] + 1 :] for row in ids if (row == 2).any()]
    assert sum(len(np.unique(rest)) > 2 for rest in behind) > 3


def test_the_report_says_how_windows_were_written(checkpoint: Checkpoint) -> None:
    ours = write(checkpoint, self_text(0.5, 0.9), seed=3).protocol
    expected = {
        "source": "self",
        "seed": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "start": 1,
        "prompts": None,
        "dtype": "float32",
        "samples": 5,
        "length": LENGTH,
    }
    assert ours.items() >= expected.items()
    assert len(ours["weights"]) == len(ours["sha256"]) == 64
    assert json.loads(json.dumps(ours)) == ours


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4", "model=2", "data=2,model=2"])
def test_devices_write_what_one_writes(checkpoint: Checkpoint, mesh: str) -> None:
    """At a low temperature no rounding decides between tokens."""
    settings = self_text(0.01)
    one = write(checkpoint, settings, samples=9)
    ids = write(checkpoint, settings, samples=9, mesh=make_mesh(mesh, 8)).ids
    np.testing.assert_array_equal(ids, one.ids)


def test_a_part_of_a_mix_is_the_beginning_of_the_text(checkpoint: Checkpoint) -> None:
    def read(source: str, count: int) -> Tokens:
        return write(checkpoint, samples=count)

    options = {"samples": 20, "length": LENGTH, "seed": 0}
    mixed = mixed_windows(parse_parts("self:1,self():3"), read, **options)
    np.testing.assert_array_equal(mixed.ids[mixed.ids[:, 0] == 1], mixed.ids)
    assert [part["windows"] for part in mixed.protocol["parts"]] == [5, 15]
    alone = write(checkpoint, samples=15).protocol["sha256"]
    assert mixed.protocol["parts"][1]["sha256"] == alone


# --- The token that begins a text.


@pytest.mark.parametrize(
    ("config", "bos", "expected"),
    [
        ({"bos_token_id": 5, "eos_token_id": 7}, True, 5),
        ({"eos_token_id": 7}, True, 1),  # what the tokenizer puts before a text
        ({"eos_token_id": 7}, False, 7),
        ({"bos_token_id": -1, "eos_token_id": 7}, False, None),
        ({"bos_token_id": None, "eos_token_id": [9, 7]}, False, 9),
        ({}, False, None),
    ],
)
def test_a_text_begins_with_bos_or_what_stands_for_it(
    checkpoint: Checkpoint,
    tmp_path: pathlib.Path,
    config: dict[str, Any],
    bos: bool,
    expected: int | None,
) -> None:
    tiny_tokenizer.write(tmp_path, bos)
    other = checkpoint._replace(config=config, directory=tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    if expected is None:
        with pytest.raises(InputError, match="names no token that begins or ends a text"):
            start_token(other, lambda: tokenizer)
    else:
        assert start_token(other, lambda: tokenizer) == expected


# --- Kept on disk.


def test_windows_are_written_once(
    checkpoint: Checkpoint, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(checkpoint, samples=16)
    assert len(list(cache.iterdir())) == 2
    forbid(monkeypatch)
    again = write(checkpoint, samples=16)
    np.testing.assert_array_equal(again.ids, first.ids)
    assert again.protocol == first.protocol
    # Fewer windows are the first of more.
    np.testing.assert_array_equal(write(checkpoint, samples=3).ids, first.ids[:3])


def test_an_interrupted_run_writes_only_the_rest(
    checkpoint: Checkpoint, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(checkpoint, samples=24)
    latest = max(cache.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    latest.unlink()
    written = count_batches(monkeypatch)
    np.testing.assert_array_equal(write(checkpoint, samples=24).ids, whole.ids)
    assert len(written) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "shape"])
def test_a_damaged_file_is_written_again(
    checkpoint: Checkpoint, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first = write(checkpoint)
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    if damage == "shape":
        write(checkpoint, length=LENGTH + 1)
        (other,) = set(cache.iterdir()) - {file}
        data = bytearray(other.read_bytes())
        other.unlink()
    file.write_bytes({"cut": data[:-8], "empty": b""}.get(damage, data))
    written = count_batches(monkeypatch)
    np.testing.assert_array_equal(write(checkpoint).ids, first.ids)
    assert len(written) == 1


def test_all_that_decides_the_tokens_decides_the_file(
    checkpoint: Checkpoint, cache: pathlib.Path, prompts: pathlib.Path, directory: pathlib.Path
) -> None:
    for settings, changes in (
        (self_text(), {}),
        (self_text(0.9), {}),
        (self_text(top_p=0.9), {}),
        (self_text(prompts=str(prompts), prompt_tokens=3), {}),
        (self_text(), {"seed": 1}),
        (self_text(), {"length": LENGTH + 1}),
    ):
        before = len(list(cache.iterdir())) if cache.is_dir() else 0
        write(checkpoint, settings, **changes)
        assert len(list(cache.iterdir())) == before + 1
    half = open_checkpoint(directory, jax.numpy.dtype("bfloat16"))
    write(half)
    assert len(list(cache.iterdir())) == 7


def test_a_directory_that_cannot_be_written_costs_only_the_copy(
    checkpoint: Checkpoint, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert write(checkpoint).ids.shape == (5, LENGTH)


# --- What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "has temperature=-1.0: give 0, or 0.001 to 100"),
        ({"temperature": 1e-30}, "has temperature=1e-30"),
        ({"top_p": 0.0}, "has top_p=0.0: give a number above 0 and at most 1"),
        ({"prompt_tokens": 0}, "has prompt_tokens=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        self_text(**settings)
    assert str(error.value).startswith(f"calibration=self {message}")


def test_windows_that_cannot_be_written_are_refused(
    checkpoint: Checkpoint, prompts: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch)
    with pytest.raises(InputError, match="temperature=0 writes fewer than 5 different windows"):
        write(checkpoint, self_text(0.0))
    with pytest.raises(InputError, match="calibration_length=1 leaves nothing to write behind 1"):
        write(checkpoint, length=1)
    with pytest.raises(InputError, match="finds no document of 50 tokens"):
        write(checkpoint, self_text(prompts=str(prompts), prompt_tokens=50))
    with pytest.raises(InputError, match=r"none\.jsonl does not exist"):
        write(checkpoint, self_text(prompts="none.jsonl"))
    arch = checkpoint.model.arch
    arch = arch._replace(config=dataclasses.replace(arch.config, vocab=20))
    small = checkpoint._replace(model=checkpoint.model._replace(arch=arch))
    with pytest.raises(InputError, match=r"has a prompt with token .*vocabulary ends at 19"):
        write(small, self_text(prompts=str(prompts), prompt_tokens=3))
    monkeypatch.setattr(generated, "available_memory", lambda: {"device": 1 << 10, "host": 1 << 40})
    with pytest.raises(InputError, match="needs the whole model and its cache in memory"):
        write(checkpoint)


def test_a_model_with_few_positions_writes_no_more(tmp_path: pathlib.Path) -> None:
    model = tiny.random_model(tiny.OPT)
    opt = open_checkpoint(tiny.write(tmp_path / "opt", tiny.state_of(tiny.OPT, model), tiny.OPT))
    tiny_tokenizer.write(tmp_path / "opt")
    with pytest.raises(InputError, match="has windows of 65 tokens, the model has 64 positions"):
        write(opt, length=65)


def test_memory_is_the_model_and_a_cache_of_all_its_keys(checkpoint: Checkpoint) -> None:
    heads, size = tiny.GQA["num_key_value_heads"], 8
    cache = 2 * tiny.GQA["num_hidden_layers"] * heads * size * 100 * generated.BATCH * 4
    expected = checkpoint.parameters * 4 + cache
    assert memory_needed(checkpoint.specs, checkpoint.parameters, 4, 100, None) == expected
    mesh = make_mesh("data=2,model=2", 2)
    halves = memory_needed(checkpoint.specs, checkpoint.parameters, 4, 100, mesh)
    assert halves == expected / 2
