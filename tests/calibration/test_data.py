"""Token files, generated stories, and rules that hold for every source."""

import hashlib
import io
import json
import pathlib
import random
from collections.abc import Callable

import numpy as np
import pytest

from calibration.data import Tokens, calibration_tokens, evaluation_tokens, token_shape
from calibration.stories import generator as stories
from calibration.tokenizer import Tokenizer
from models.errors import InputError
from reference.loaders import VOCAB, texts, tokenize
from reference.windows import calibrate, evaluate


def no_tokenizer() -> Tokenizer:
    """Fail: a token file needs no tokenizer."""
    raise AssertionError("tokens need no tokenizer")


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".jsonl", ".parquet", ".npy"])
def test_a_missing_file_is_refused(tmp_path: pathlib.Path, suffix: str) -> None:
    for read in (calibrate, evaluate):
        with pytest.raises(InputError, match=r"none\.\w+ does not exist"):
            read(tmp_path / f"none{suffix}")


@pytest.mark.parametrize("source", ["wikitext", "c4.gz", "", "some/dir", "tokens.npz"])
def test_an_unknown_source_lists_the_known_ones(source: str) -> None:
    for read in (calibrate, evaluate):
        with pytest.raises(
            InputError,
            match=r"is no known data source: give one of embedded, wikitext2, c4, ptb, "
            r"or a file \.npy, \.txt",
        ):
            read(source)


def test_home_directory_is_expanded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("a" * 100)
    np.save(tmp_path / "tokens.npy", np.ones((2, 8), np.int32))
    assert evaluate("~/notes.txt").ids.shape == (3, 32)
    assert evaluate("~/tokens.npy").ids.shape == (2, 8)


# --- Token files.


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<i8", "<u2", "|u1"])
def test_a_token_file_is_used_unchanged(tmp_path: pathlib.Path, dtype: str) -> None:
    ids = np.random.default_rng(0).integers(0, 200, (6, 40)).astype(dtype)
    np.save(tmp_path / "tokens.npy", np.asfortranarray(ids))
    path, settings = str(tmp_path / "tokens.npy"), {"length": 8, "vocab": 200}
    ours = calibration_tokens(path, no_tokenizer, samples=3, seed=1, **settings)
    np.testing.assert_array_equal(ours.ids, ids)
    assert ours.ids.dtype == np.int32 and ours.ids.flags.c_contiguous
    assert ours.protocol["sha256"] == hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    np.testing.assert_array_equal(
        evaluation_tokens(path, no_tokenizer, windows=0, **settings).ids, ids
    )
    np.testing.assert_array_equal(
        evaluation_tokens(path, no_tokenizer, windows=4, **settings).ids, ids[:4]
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8), np.float32), "holds float32, and tokens are integers"),
        (np.zeros((2, 8), bool), "holds bool, and tokens are integers"),
        (np.zeros(8, np.int32), r"has shape \[8\], and tokens are \[samples, length\]"),
        (np.zeros((2, 2, 8), np.int32), r"has shape \[2, 2, 8\]"),
        (np.zeros((0, 8), np.int32), r"has shape \[0, 8\]"),
        (np.zeros((2, 0), np.int32), r"has shape \[2, 0\]"),
        (
            np.full((2, 8), VOCAB),
            rf"token id {VOCAB} outside the model's vocabulary \(0 to {VOCAB - 1}\)",
        ),
        (np.array([[3, -1]]), "token id -1 outside"),
        # It would be 5 in int32.
        (np.array([[2**32 + 5]] * 2).reshape(1, 2), f"token id {2**32 + 5} outside"),
        (np.array([[2**64 - 1, 0]], np.uint64), f"token id {2**64 - 1} outside"),
        (np.array([[{}, {}]], object), "holds object, and tokens are integers"),
    ],
)
def test_a_token_file_of_the_wrong_kind_is_refused(
    tmp_path: pathlib.Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "tokens.npy", array)
    for read in (calibrate, evaluate):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "tokens.npy")


def header(samples: int, length: int) -> bytes:
    """Return the start of a `.npy` file that promises int32 [samples length]."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<i4", "fortran_order": False, "shape": (samples, length)}
    )
    return file.getvalue()


BROKEN = {
    "empty": b"",
    "other": b"not numpy",
    "magic only": b"\x93NUMPY\x01\x00",
    "archive": b"PK\x03\x04 a broken archive",
    "truncated": header(2, 8) + b"1234",
    "400 TB": header(10**7, 10**7),
    "open bracket": header(2, 8).replace(b"(2, 8)", b"(2, 8(") + bytes(64),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_not_npy_is_refused(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npy is not a readable \.npy file"):
        calibrate(tmp_path / "x.npy")


def test_an_archive_named_npy_is_refused(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros((2, 8), np.int32))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(InputError, match=r"not a readable \.npy file"):
        calibrate(tmp_path / "x.npy")


def test_one_token_windows_cannot_be_evaluated(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 1), np.int32))
    with pytest.raises(InputError, match="windows of one token"):
        evaluate(tmp_path / "x.npy")
    assert calibrate(tmp_path / "x.npy").ids.shape == (4, 1)


# --- Stories, and every source.


def test_embedded_is_the_stories_in_order() -> None:
    ours = calibrate("embedded", samples=6, length=50, seed=3)
    other = stories.stream("calibration", 3)
    text = "".join(next(other) for _ in range(10))
    np.testing.assert_array_equal(ours.ids.ravel(), tokenize(text)[:300])
    np.testing.assert_array_equal(
        calibrate("embedded", samples=2, length=50, seed=3).ids, ours.ids[:2]
    )


def test_embedded_evaluation_has_64_windows_unless_more_are_asked_for() -> None:
    ours, other = evaluate("embedded"), stories.stream("evaluation")
    text = "".join(next(other) for _ in range(30))
    assert ours.ids.shape == (64, 32)
    np.testing.assert_array_equal(ours.ids.ravel(), tokenize(text)[: 64 * 32])
    np.testing.assert_array_equal(evaluate("embedded", windows=5).ids, ours.ids[:5])
    assert evaluate("embedded", windows=100).ids.shape == (100, 32)


def test_the_seed_decides_every_draw(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("".join(texts(50, 50)))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts(50, 50))
    )
    for source in ("embedded", tmp_path / "a.txt", tmp_path / "a.jsonl"):
        one, again, two = (calibrate(source, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one.ids, again.ids)
        assert one.protocol == again.protocol
        assert not np.array_equal(one.ids, two.ids)


def test_the_global_random_state_does_not_change(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("".join(texts(50, 50)))
    state = random.getstate()
    calibrate(tmp_path / "a.txt")
    assert random.getstate() == state


def test_the_protocol_records_how_windows_were_made(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(50, 50)))
    ours = calibrate(path, seed=9)
    expected = {
        "source": str(path),
        "dataset": "a.jsonl",
        "seed": 9,
        "samples": 5,
        "length": 32,
        "special_tokens": False,
        "join": None,
    }
    assert ours.protocol.items() >= expected.items()
    assert ours.protocol["sha256"] == hashlib.sha256(ours.ids.tobytes()).hexdigest()
    assert "documents" in ours.protocol["cut"]
    assert json.loads(json.dumps(ours.protocol)) == ours.protocol
    windows = evaluate(path)
    assert (
        windows.protocol.items()
        >= {"samples": len(windows.ids), "length": 32, "join": "\n\n"}.items()
    )
    assert "seed" not in windows.protocol


def test_a_tokenizer_of_another_model_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 10)
    with pytest.raises(
        InputError,
        match=r"a\.txt has token id 104 outside the model's vocabulary \(0 to 99\): "
        r"use this model's own tok",
    ):
        evaluate(tmp_path / "a.txt", vocab=100)


@pytest.mark.parametrize(
    ("read", "setting", "message"),
    [
        (calibrate, {"samples": 0}, "calibration_samples=0"),
        (calibrate, {"length": 0}, "calibration_length=0"),
        (evaluate, {"length": 1}, "eval_length=1"),
        (evaluate, {"windows": -1}, "eval_windows=-1"),
    ],
)
def test_sizes_below_the_least_are_refused(
    read: Callable[..., Tokens], setting: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message} is too small"):
        read("embedded", **setting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 2**31 - 1}, "calibration_samples=2147483647 is too large: give 1048576 or"),
        ({"length": 2**31 - 1}, "calibration_length=2147483647 is too large"),
        ({"samples": 2**20, "length": 1024}, "calibration_samples=1048576 asks for 1073741824 tok"),
    ],
)
def test_windows_without_end_are_refused_before_any_is_made(
    settings: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        calibrate("embedded", **settings)


def test_a_tokenizer_that_gives_no_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="gives no tokens for a text"):
        calibration_tokens(
            "embedded", lambda: lambda text, special=False: [], samples=1, length=8, seed=0, vocab=9
        )


def test_the_shape_of_a_token_file_is_read_without_its_tokens(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros((3, 7), np.uint16))
    assert token_shape(str(tmp_path / "tokens.npy"), "calibration") == (3, 7)
    for wrong in (np.zeros(8, int), np.zeros((2, 2, 2), int), np.zeros((0, 4), int), np.array(3)):
        np.save(tmp_path / "tokens.npy", wrong)
        with pytest.raises(InputError, match=r"tokens are \[samples, length\]"):
            token_shape(str(tmp_path / "tokens.npy"), "calibration")
