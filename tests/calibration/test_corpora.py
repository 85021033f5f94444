"""Text from the hub and from files: the papers' sampling, every format, every error."""

import gzip
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from calibration import text_files
from calibration.corpora import HUB
from calibration.data import calibration_tokens, evaluation_tokens
from calibration.tokenizer import load_tokenizer
from models.errors import InputError
from reference.hub_datasets import add_dataset
from reference.loaders import (
    BOS,
    VOCAB,
    paper_documents,
    paper_stream,
    paper_windows,
    texts,
    tokenize,
)
from reference.local_hub import LocalHub
from reference.windows import calibrate, evaluate


@pytest.fixture
def hub(
    local_hub: LocalHub, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., LocalHub]:
    """Return a function that puts rows on the hub of this machine, as a data set's own files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets cache")

    def use(name: str, **splits: Sequence[str]) -> LocalHub:
        add_dataset(local_hub, name, splits)
        return local_hub

    return use


@pytest.mark.parametrize("seed", [0, 1, 1234])
@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_stream_calibration_is_the_papers(
    hub: Callable[..., LocalHub], name: str, seed: int
) -> None:
    train = texts(40, 30)
    hub(name, train=train, test=["not this split" * 100])
    ours = calibrate(name, samples=9, seed=seed)
    np.testing.assert_array_equal(
        ours.ids, paper_stream(tokenize(" ".join(train), True), 9, seed, 32)
    )
    assert ours.ids.dtype == np.int32
    assert (
        ours.protocol["special_tokens"]
        and ours.protocol["join"] == " "
        and ours.protocol["split"] == "train"
    )


@pytest.mark.parametrize(("name", "join"), [("wikitext2", "\n\n"), ("ptb", " ")])
def test_stream_evaluation_is_the_papers(
    hub: Callable[..., LocalHub], name: str, join: str
) -> None:
    test = texts(40, 30)
    hub(name, train=["not this split" * 100], test=test)
    ours, theirs = evaluate(name), paper_windows(tokenize(join.join(test), True), 32)
    np.testing.assert_array_equal(ours.ids, theirs)
    assert list(ours.ids[:, 0]).count(BOS) == 1  # the text's own, none added to a window
    np.testing.assert_array_equal(evaluate(name, windows=3).ids, theirs[:3])
    assert evaluate(name, windows=10_000).ids.shape == theirs.shape


@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_c4_calibration_is_the_papers(hub: Callable[..., LocalHub], seed: int) -> None:
    train = texts(60, 45)  # about a third are long enough
    # With BOS 32 tokens, too short by Wanda's >, and 33, which leaves a single window.
    train += ["x" * 31, "y" * 32]
    hub("c4", train=train)
    theirs = paper_documents(train, 40, seed, 32, special=True)
    np.testing.assert_array_equal(calibrate("c4", samples=40, seed=seed).ids, theirs)


def test_c4_evaluation_is_the_papers(hub: Callable[..., LocalHub]) -> None:
    validation = texts(1200, 30)
    hub("c4", validation=validation)
    stream = tokenize(" ".join(validation[:1100]), True)
    assert len(stream) > 256 * 32  # so the cut at 256 windows is seen
    theirs = paper_windows(stream[: 256 * 32], 32)
    np.testing.assert_array_equal(evaluate("c4").ids, theirs)
    np.testing.assert_array_equal(evaluate("c4", windows=300).ids, theirs)
    np.testing.assert_array_equal(evaluate("c4", windows=7).ids, theirs[:7])
    # Under 256 windows, so that the limit of 1100 texts decides.
    np.testing.assert_array_equal(evaluate("c4", length=128).ids, paper_windows(stream, 128))


@pytest.mark.parametrize(("name", "split"), [("wikitext2", "train"), ("c4", "train")])
def test_a_hub_set_is_read_at_a_fixed_commit(
    hub: Callable[..., LocalHub], name: str, split: str
) -> None:
    local = hub(name, train=texts(60, 90))
    source = HUB[name]
    assert len(source.revision) == 40  # a commit, not a branch that moves
    repository = local.repositories["datasets", source.dataset]
    repository.commit({"README.md": b"the main branch has no data"})
    protocol = calibrate(name).protocol
    assert protocol["dataset"] == source.dataset and protocol["split"] == split
    assert protocol["revision"] == protocol["commit"] == source.revision
    assert local.asked("HEAD /datasets/.*/resolve") == 1, "one file of many is downloaded"


def test_ptb_is_read_from_the_conversion_of_the_hub(hub: Callable[..., LocalHub]) -> None:
    # The main branch has a loading script, which datasets 4 refuses. The hub's conversion is here.
    local = hub("ptb", test=texts(60, 90), train=texts(60, 90))
    protocol = evaluate("ptb").protocol
    repository = local.repositories["datasets", "ptb-text-only/ptb_text_only"]
    assert protocol["revision"] == "refs/convert/parquet"
    assert protocol["commit"] == repository.refs["refs/convert/parquet"]
    assert local.asked("HEAD /datasets/.*/test/0000.parquet") == 1
    assert local.asked("HEAD /datasets/.*/train/0000.parquet") == 0


def test_c4_is_refused_when_no_document_is_long_enough(hub: Callable[..., LocalHub]) -> None:
    hub("c4", train=["a" * n for n in range(20)])
    with pytest.raises(
        InputError,
        match=r"calibration=c4 has 20 documents, none of more than 32 tokens .the longest has 20.*"
        r"calibration_length",
    ):
        calibrate("c4")


def test_c4_tokenizes_a_short_document_once(hub: Callable[..., LocalHub]) -> None:
    hub("c4", train=["short", "long" * 100, "also short"])
    seen: list[str] = []

    def counting(text: str, special: bool = False) -> list[int]:
        seen.append(text)
        return tokenize(text, special)

    calibration_tokens("c4", lambda: counting, samples=50, length=32, seed=0, vocab=VOCAB)
    assert seen.count("short") == seen.count("also short") == 1


@pytest.mark.parametrize("name", HUB)
def test_a_filled_cache_needs_no_network(
    hub: Callable[..., LocalHub], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts(60, 90)
    local = hub(name, train=rows, test=rows, validation=rows)
    online = [read(name) for read in (calibrate, evaluate)]
    local.requests.clear()
    for setting, value in (
        ("HF_HUB_OFFLINE", True),
        ("HF_HUB_OFFLINE", False),
        ("ENDPOINT", "http://127.0.0.1:9"),
    ):
        monkeypatch.setattr(huggingface_hub.constants, setting, value)
        if setting == "ENDPOINT" or value:
            offline = [read(name) for read in (calibrate, evaluate)]
            assert [t.protocol for t in offline] == [t.protocol for t in online]
    assert not local.requests


def test_a_hub_set_that_cannot_be_had_is_one_line(
    local_hub: LocalHub,
    hub: Callable[..., LocalHub],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"^calibration=c4 is no data set of the hub, or a gated"):
        calibrate("c4")
    local_hub.add("allenai/c4", {"README.md": b""}, "datasets")
    with pytest.raises(InputError, match=r"^eval_data=c4 cannot be found, as allenai/c4 has no re"):
        evaluate("c4")
    hub("c4", train=["text"])
    with pytest.raises(InputError, match=r"^eval_data=c4 cannot be read: .* has no en/c4-valid"):
        evaluate("c4")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"^eval_data=ptb is not in the cache") as caught:
        evaluate("ptb")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "the error is the only output"


@pytest.mark.slow
def test_a_busy_hub_and_a_cut_body_are_tried_again(hub: Callable[..., LocalHub]) -> None:
    local = hub("wikitext2", train=texts(60, 90), test=texts(61, 90))
    local.fail("GET /lfs", times=2)
    assert calibrate("wikitext2").ids.shape == (5, 32)
    local.fail("GET /lfs", status=0)
    assert len(evaluate("wikitext2").ids)
    assert local.asked("GET /lfs") == 3 + 2


# --- Local text.


def write_jsonl(path: pathlib.Path, documents: Sequence[str]) -> None:
    path.write_text(
        "\n".join(json.dumps({"text": d, "url": "u"}, ensure_ascii=False) for d in documents)
        + "\n\n",
        encoding="utf-8",
    )


def test_a_txt_file_is_one_text_without_bos(tmp_path: pathlib.Path) -> None:
    text = "".join(texts(40, 40)) + "naïve\r\n\u2028 and the end\r\n"
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode())
    ids = tokenize(text)  # no BOS for a local file, and \r\n stays
    np.testing.assert_array_equal(calibrate(path, seed=3).ids, paper_stream(ids, 5, 3, 32))
    np.testing.assert_array_equal(evaluate(path).ids, paper_windows(ids, 32))
    assert calibrate(path).protocol["special_tokens"] is False


def test_a_text_of_exactly_enough_tokens_is_accepted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a" * 33)
    assert calibrate(path).ids.shape == (5, 32)
    path.write_text("a" * 32)
    assert evaluate(path).ids.shape == (1, 32)
    with pytest.raises(
        InputError,
        match=r"notes\.txt has 32 tokens, and drawing a window of 32 needs 33.*calibration_length",
    ):
        calibrate(path)
    path.write_text("a" * 31)
    with pytest.raises(
        InputError, match=r"notes\.txt has 31 tokens, less than a window of 32.*eval_length"
    ):
        evaluate(path)


def test_raw_is_read_into_the_rows_of_wikitext2(
    tmp_path: pathlib.Path, hub: Callable[..., LocalHub]
) -> None:
    rows = [
        "",
        " = Title = \n",
        "",
        " Some words \u2028 and <unk> more . \n",
        " A second line \n",
        "",
    ] * 20
    path = tmp_path / "wiki.raw"
    path.write_text("".join(row or " \n" for row in rows))
    hub("wikitext2", train=rows, test=rows)
    with_bos = evaluate("wikitext2").ids.ravel()
    np.testing.assert_array_equal(evaluate(path).ids.ravel()[: len(with_bos) - 1], with_bos[1:])
    np.testing.assert_array_equal(
        calibrate(path).ids, paper_stream(tokenize(" ".join(rows)), 5, 0, 32)
    )


def write_parquet(path: pathlib.Path, documents: Sequence[str]) -> None:
    pq.write_table(
        pa.table({"id": list(range(len(documents))), "text": documents}), path, row_group_size=7
    )


@pytest.mark.parametrize(
    ("suffix", "write"), [(".jsonl", write_jsonl), (".parquet", write_parquet)]
)
def test_document_files_are_read_as_c4(
    tmp_path: pathlib.Path, suffix: str, write: Callable[[pathlib.Path, Sequence[str]], None]
) -> None:
    documents = [*texts(60, 50), "a line separator \u2028 is no new line \x85"]
    path = tmp_path / f"documents{suffix}"
    write(path, documents)
    np.testing.assert_array_equal(
        calibrate(path, samples=30, seed=5).ids,
        paper_documents(documents, 30, 5, 32, special=False),
    )
    np.testing.assert_array_equal(
        evaluate(path).ids, paper_windows(tokenize("\n\n".join(documents)), 32)
    )
    write(path, documents[:0])
    with pytest.raises(InputError, match="has 0 tokens, and drawing a window of 32 needs 33"):
        calibrate(path)
    with pytest.raises(InputError, match="has 0 tokens"):
        evaluate(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}\n{"text": "b"\n',
            r"x\.jsonl is not JSON in line 2 .*: write every line as",
        ),
        ('\n{"text": "a"}\n{"body": "b"}\n', r"x\.jsonl has no string in field 'text' of line 3"),
        ('{"text": 3}\n', "has no string in field 'text' of line 1"),
        ('["text"]\n', "has no string in field 'text' of line 1"),
        ('{"text": null}\n', "has no string in field 'text' of line 1"),
        ("[" * 100_000, r"is not JSON in line 1 \(nested too deeply\)"),
        ('{"n": ' + "1" * 5000 + "}", r"has no string .* \(it has n\)"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path: pathlib.Path, content: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    for read in (calibrate, evaluate):
        with pytest.raises(InputError, match=message):
            read(path)


def test_malformed_parquet_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(InputError, match=r"x\.parquet cannot be read as parquet"):
        calibrate(path)
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), path)
    with pytest.raises(InputError, match=r"has no column 'text' \(it has content, id\)"):
        calibrate(path)
    for column in (["a", None], [1, 2]):
        pq.write_table(pa.table({"text": column}), path)
        with pytest.raises(InputError, match="has a row without a string in column 'text'"):
            calibrate(path)


def test_fields_that_are_there_are_named_where_text_is_not(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(InputError, match=r"of line 1 \(it has instruction, output\)"):
        calibrate(path)


DOCUMENTS = texts(30, 60)
LINES = "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS).encode()
FORMS: dict[str, tuple[str, bytes]] = {
    "a byte-order mark": ("x.jsonl", b"\xef\xbb\xbf" + LINES),
    "CRLF and empty lines": ("x.jsonl", LINES.replace(b"\n", b"\r\n\r\n")),
    "gzip": ("x.jsonl.gz", gzip.compress(LINES)),
    "lines named json": ("x.json", LINES),
    "an array": ("x.json", json.dumps([{"text": d} for d in DOCUMENTS]).encode()),
    "an array in gzip": (
        "x.json.gz",
        gzip.compress(json.dumps([{"text": d, "n": 10**30} for d in DOCUMENTS]).encode()),
    ),
    "UTF-16": ("x.jsonl", LINES.decode().encode("utf-16")),
}


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_read_in_every_form_they_come_in(form: str, tmp_path: pathlib.Path) -> None:
    name, content = FORMS[form]
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    (tmp_path / name).write_bytes(content)
    want = calibrate(tmp_path / "plain.jsonl", samples=9).ids
    np.testing.assert_array_equal(calibrate(tmp_path / name, samples=9).ids, want)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_text_may_begin_with_a_byte_order_mark(encoding: str, tmp_path: pathlib.Path) -> None:
    text = " ".join(DOCUMENTS)
    (tmp_path / "plain.txt").write_bytes(text.encode())
    (tmp_path / "marked.txt").write_bytes(text.encode(encoding))
    np.testing.assert_array_equal(
        evaluate(tmp_path / "marked.txt").ids, evaluate(tmp_path / "plain.txt").ids
    )


def test_half_of_a_surrogate_pair_names_its_line(tmp_path: pathlib.Path) -> None:
    lines = LINES.decode().splitlines()
    lines[7] = lines[7].replace('{"text": "', '{"text": "\\ud83d')
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"half of a surrogate pair in line 8: put U\+FFFD"):
        calibrate(tmp_path / "x.jsonl")


def test_documents_shorter_than_a_window_are_joined_and_the_record_says_so(
    tmp_path: pathlib.Path,
) -> None:
    short = [f"Turn {i}." for i in range(300)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["", *short, "   "]))
    tokens = calibrate(path, samples=9, seed=3)
    stream = tokenize("\n\n".join(["", *short, "   "]))
    np.testing.assert_array_equal(tokens.ids, paper_stream(stream, 9, 3, 32))
    (warning,) = tokens.warnings
    assert "none of more than 32 tokens" in warning and "go across documents" in warning
    assert tokens.protocol["join"] == "\n\n"


def test_many_windows_of_one_document_are_warned_of(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.jsonl"
    write_jsonl(path, ["short"] * 50 + ["long " * 100])
    (warning,) = calibrate(path, samples=128).warnings
    assert "all 128 windows" in warning and "come from 1 of its 51 documents" in warning
    write_jsonl(path, texts(200, 60))
    assert calibrate(path, samples=128).warnings == ()


def test_a_document_is_tokenized_once_however_many_windows_come_from_it(
    tmp_path: pathlib.Path,
) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["long " * 100, "short"])
    seen: list[str] = []

    def counting(text: str, special: bool = False) -> list[int]:
        seen.append(text)
        return tokenize(text, special)

    calibration_tokens(
        str(tmp_path / "x.jsonl"), lambda: counting, samples=128, length=32, seed=0, vocab=VOCAB
    )
    assert sorted(map(len, seen)) in ([500], [5, 500])


def test_gzip_that_expands_without_end_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MOST_UNPACKED", 1 << 20)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(InputError, match="holds more than 1 MiB of text"):
        evaluate(tmp_path / "bomb.txt.gz")
    for content in (b"", b"not gzip", gzip.compress(LINES)[:50]):
        (tmp_path / "bad.txt.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be unpacked|has 0 tokens"):
            evaluate(tmp_path / "bad.txt.gz")


def test_parquet_with_two_text_columns_or_no_valid_text_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, path)
    with pytest.raises(InputError, match="has 2 columns 'text': rename all but one"):
        calibrate(path)
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": text}), path)
    with pytest.raises(InputError, match="cannot be read as parquet"):
        calibrate(path)


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".jsonl"])
def test_text_that_is_not_utf8_names_the_byte(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"latin{suffix}"
    path.write_bytes("a naïve café".encode("latin-1"))
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 4\)"):
        evaluate(path)


# --- Real data.


def test_real_wikitext_joins_to_the_published_text(shared: pathlib.Path) -> None:
    path = shared / "data/wikitext2/wiki.test.raw"
    seen: list[str] = []

    def keep(text: str, special: bool = False) -> list[int]:
        seen.append(text)
        return [0, 1]

    evaluation_tokens(str(path), lambda: keep, length=2, windows=0, vocab=2)
    (text,) = seen
    assert hashlib.sha256(text.encode()).hexdigest().startswith("696cca6b65a171b0a3")
    assert text.count("\n\n") >= 4357  # between 4,358 rows


def test_real_wikitext_windows_are_those_of_transformers(
    tmp_path: pathlib.Path, shared: pathlib.Path, smollm2: pathlib.Path
) -> None:
    lines = (shared / "data/wikitext2/wiki.test.raw").read_text(encoding="utf-8").split("\n")[:800]
    (tmp_path / "wiki.raw").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    ours = evaluation_tokens(
        str(tmp_path / "wiki.raw"),
        lambda: load_tokenizer(smollm2),
        length=2048,
        windows=0,
        vocab=49152,
    ).ids
    text = "\n\n".join(f"{line}\n" if line != " " else "" for line in lines)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)(
        text, add_special_tokens=False, verbose=False
    )["input_ids"]
    np.testing.assert_array_equal(ours, paper_windows(theirs, 2048))
    assert len(ours) > 20
