"""Text from the hub and from files: the papers' sampling, every format, every error."""

import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from calibration.data import calibration_tokens, evaluation_tokens
from calibration.tokenizer import load_tokenizer
from models.errors import InputError
from reference.loaders import (
    BOS,
    VOCAB,
    paper_documents,
    paper_stream,
    paper_windows,
    texts,
    tokenize,
)
from reference.windows import calibrate, evaluate


class Hub:
    """A `datasets.load_dataset` over a few rows that records its calls."""

    def __init__(self, field: str, **splits: Sequence[str]) -> None:
        self.field = field
        self.splits = splits
        self.calls: list[tuple[str, str | None, dict[str, Any]]] = []

    def __call__(self, dataset: str, config: str | None = None, **options: Any) -> Any:
        self.calls.append((dataset, config, options))
        rows = self.splits[options["split"]]
        return datasets.Dataset.from_dict({self.field: rows, "id": range(len(rows))})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    """Replace the hub by a few rows."""

    def use(field: str, **splits: Sequence[str]) -> Hub:
        fake = Hub(field, **splits)
        monkeypatch.setattr(datasets, "load_dataset", fake)
        return fake

    return use


@pytest.mark.parametrize("seed", [0, 1, 1234])
@pytest.mark.parametrize(("name", "field"), [("wikitext2", "text"), ("ptb", "sentence")])
def test_stream_calibration_is_the_papers(
    hub: Callable[..., Hub], name: str, field: str, seed: int
) -> None:
    train = texts(40, 30)
    hub(field, train=train, test=["not this split" * 100])
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


@pytest.mark.parametrize(
    ("name", "field", "join"), [("wikitext2", "text", "\n\n"), ("ptb", "sentence", " ")]
)
def test_stream_evaluation_is_the_papers(
    hub: Callable[..., Hub], name: str, field: str, join: str
) -> None:
    test = texts(40, 30)
    hub(field, train=["not this split" * 100], test=test)
    ours, theirs = evaluate(name), paper_windows(tokenize(join.join(test), True), 32)
    np.testing.assert_array_equal(ours.ids, theirs)
    assert list(ours.ids[:, 0]).count(BOS) == 1  # the text's own, none added to a window
    np.testing.assert_array_equal(evaluate(name, windows=3).ids, theirs[:3])
    assert evaluate(name, windows=10_000).ids.shape == theirs.shape


@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_c4_calibration_is_the_papers(hub: Callable[..., Hub], seed: int) -> None:
    train = texts(60, 45)  # about a third are long enough
    # With BOS 32 tokens, too short by Wanda's >, and 33, which leaves a single window.
    train += ["x" * 31, "y" * 32]
    hub("text", train=train)
    theirs = paper_documents(train, 40, seed, 32, special=True)
    np.testing.assert_array_equal(calibrate("c4", samples=40, seed=seed).ids, theirs)


def test_c4_evaluation_is_the_papers(hub: Callable[..., Hub]) -> None:
    validation = texts(1200, 30)
    fake = hub("text", validation=validation)
    stream = tokenize(" ".join(validation[:1100]), True)
    assert len(stream) > 256 * 32  # so the cut at 256 windows is seen
    theirs = paper_windows(stream[: 256 * 32], 32)
    np.testing.assert_array_equal(evaluate("c4").ids, theirs)
    np.testing.assert_array_equal(evaluate("c4", windows=300).ids, theirs)
    np.testing.assert_array_equal(evaluate("c4", windows=7).ids, theirs[:7])
    # Under 256 windows, so that the limit of 1100 texts decides.
    np.testing.assert_array_equal(evaluate("c4", length=128).ids, paper_windows(stream, 128))
    assert fake.calls[0][2]["data_files"] == {
        "validation": "en/c4-validation.00000-of-00008.json.gz"
    }


def test_the_hub_is_asked_for_fixed_files_and_revisions(hub: Callable[..., Hub]) -> None:
    fake = hub("text", train=texts(60, 90))
    calibrate("wikitext2")
    dataset, config, options = fake.calls.pop()
    assert (dataset, config, options["data_files"]) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        None,
    )
    protocol = calibrate("c4").protocol
    dataset, config, options = fake.calls.pop()
    assert (dataset, config) == ("allenai/c4", None)
    assert options["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert len(options["revision"]) == 40  # a commit, not a branch that moves
    assert (protocol["dataset"], protocol["revision"], protocol["file"]) == (
        dataset,
        options["revision"],
        options["data_files"]["train"],
    )


def test_ptb_is_read_from_the_conversion_of_the_hub(hub: Callable[..., Hub]) -> None:
    fake = hub("sentence", test=texts(60, 90))
    evaluate("ptb")
    dataset, config, options = fake.calls.pop()
    assert (dataset, config) == ("ptb-text-only/ptb_text_only", None)
    # The main branch has a loading script, which datasets 4 refuses. The hub's conversion is here.
    assert (options["revision"], options["data_files"]) == (
        "refs/convert/parquet",
        {"test": "penn_treebank/test/0000.parquet"},
    )


def test_c4_is_refused_when_no_document_is_long_enough(hub: Callable[..., Hub]) -> None:
    hub("text", train=["a" * n for n in range(20)])
    with pytest.raises(
        InputError,
        match=r"calibration=c4 has 20 documents, none of more than 32 tokens .the longest has 20.*"
        r"calibration_length",
    ):
        calibrate("c4")


def test_c4_tokenizes_a_short_document_once(hub: Callable[..., Hub]) -> None:
    hub("text", train=["short", "long" * 100, "also short"])
    seen: list[str] = []

    def counting(text: str, special: bool = False) -> list[int]:
        seen.append(text)
        return tokenize(text, special)

    calibration_tokens("c4", lambda: counting, samples=50, length=32, seed=0, vocab=VOCAB)
    assert seen.count("short") == seen.count("also short") == 1


def test_unreachable_hub_is_one_line_that_names_the_data_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    for read in (calibrate, evaluate):
        with pytest.raises(
            InputError,
            match=r"=c4 cannot be reached \(allenai/c4: Couldn't reach.*give a local",
        ) as caught:
            read("c4")
        assert "\n" not in str(caught.value)


def test_offline_the_error_is_the_only_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture
) -> None:
    """The real `datasets` in its offline mode."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match=r"=wikitext2 cannot be reached \(Salesforce/wikitext: "):
        evaluate("wikitext2")
    assert capfd.readouterr().err == ""


def test_retries_of_the_hub_client_are_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning a retry would bury the error. They are off during the download only."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    during = []

    def fail(*_: Any, **__: Any) -> None:
        during.append(logger.isEnabledFor(logging.WARNING))
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    with pytest.raises(InputError, match=r"cannot be reached .*: ConnectionError"):
        calibrate("ptb")
    assert during == [False] and logger.isEnabledFor(logging.WARNING)


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
    tmp_path: pathlib.Path, hub: Callable[..., Hub]
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
    hub("text", train=rows, test=rows)
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
    with pytest.raises(InputError, match="has 0 documents, none of more"):
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
