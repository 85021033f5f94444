"""Where text comes from: WikiText-2, C4 and PTB from the hub exactly as the papers read them, and local files."""

import itertools
import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from models.errors import InputError

Purpose = Literal["calibration", "evaluation"]
SUFFIXES = (".txt", ".raw", ".jsonl", ".parquet")
FIELD = "text"  # of a .jsonl line, of a .parquet table


class Corpus(NamedTuple):
    """Texts and how to read windows from them."""

    texts: Sequence[str]
    join: str  # put between the texts where they are read as one stream
    stamp: dict[str, Any]  # which data this is, for the report
    by_document: bool = (
        False  # calibration draws a text, then a window in it; else a window of the stream
    )
    special_tokens: bool = False  # tokenize with the tokenizer's own BOS and EOS
    most_windows: int = 0  # the protocol evaluates no more than these (0 = all)


class HubText(NamedTuple):
    """What one purpose takes of a hub data set."""

    split: str
    join: str
    file: str | None = None
    by_document: bool = False
    most_texts: int | None = None
    most_windows: int = 0


class HubSet(NamedTuple):
    """A data set of the hub, at a fixed revision."""

    dataset: str
    config: str | None
    revision: str
    field: str
    calibration: HubText
    evaluation: HubText


# `get_loaders` of SparseGPT (datautils.py) and Wanda (lib/data.py). The hub has moved since: the ids have owners now, C4 needs no
# config beside its file, and PTB, once a loading script, is read from the hub's own conversion of it.
HUB = {
    "wikitext2": HubSet(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "text",
        HubText("train", join=" "),
        HubText("test", join="\n\n"),
    ),
    "c4": HubSet(
        "allenai/c4",
        None,
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        "text",
        HubText("train", join=" ", file="en/c4-train.00000-of-01024.json.gz", by_document=True),
        HubText(
            "validation",
            join=" ",
            file="en/c4-validation.00000-of-00008.json.gz",
            most_texts=1100,
            most_windows=256,
        ),
    ),
    "ptb": HubSet(
        "ptb-text-only/ptb_text_only",
        None,
        "refs/convert/parquet",
        "sentence",
        HubText("train", join=" ", file="penn_treebank/train/0000.parquet"),
        HubText("test", join=" ", file="penn_treebank/test/0000.parquet"),
    ),
}


def load_corpus(source: str, purpose: Purpose) -> Corpus:
    """The texts of a data set's name or a file's path. Raises InputError when there is no such source or it cannot be read."""
    return (
        load_hub(source, purpose)
        if source in HUB
        else load_file(pathlib.Path(source).expanduser(), purpose)
    )


def load_hub(name: str, purpose: Purpose) -> Corpus:
    """A data set of `HUB` through `datasets.load_dataset`: downloaded, or from its cache.

    Raises InputError when it cannot be had: no network, no such file any more.
    """
    import datasets

    source = HUB[name]
    part = source.calibration if purpose == "calibration" else source.evaluation
    which = {"revision": source.revision, "split": part.split}
    files = {part.split: part.file} if part.file else None
    try:
        with _quiet_retries():
            rows = datasets.load_dataset(source.dataset, source.config, data_files=files, **which)
    except Exception as e:  # datasets, huggingface_hub, httpx and pyarrow each raise their own
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"the data set {name} ({source.dataset}) cannot be reached: {reason}; "
            "connect to the hub, or give a local .txt, .jsonl, .parquet or .npy file instead"
        ) from e
    texts = rows[source.field]
    if part.most_texts is not None:
        texts = list(itertools.islice(texts, part.most_texts))
    stamp = {"dataset": source.dataset, "config": source.config, "file": part.file, **which}
    return Corpus(
        texts,
        part.join,
        stamp,
        part.by_document,
        special_tokens=True,
        most_windows=part.most_windows,
    )


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """The hub client logs every retry; offline that buries the one line that says what is wrong."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_file(path: pathlib.Path, purpose: Purpose) -> Corpus:
    """A local text file, by its suffix.

    - `.txt`: one text, as it is.
    - `.raw`: WikiText's own format, read into the rows that `wikitext2` has and joined in the same way.
    - `.jsonl` (field `text`), `.parquet` (column `text`): documents, drawn from as C4 for calibration, joined by a blank line for
      evaluation.

    Raises InputError when there is no such file or it cannot be read, with the line where there is one.
    """
    if path.suffix not in SUFFIXES:
        known = ", ".join(["embedded", *HUB]), ", ".join([".npy", *SUFFIXES])
        raise InputError(
            f"there is no data source {str(path)!r}: give one of {known[0]}, or a file {known[1]}"
        )
    if not path.is_file():
        raise InputError(f"{path}: there is no such file, check the path")
    stamp = {"dataset": path.name}
    match path.suffix:
        case ".txt":
            return Corpus([_read_text(path)], "", stamp)
        case ".raw":
            return Corpus(
                _wikitext_rows(_read_text(path)), " " if purpose == "calibration" else "\n\n", stamp
            )
        case ".jsonl":
            return Corpus(_read_jsonl(path), "\n\n", stamp, by_document=True)
        case _:
            return Corpus(_read_parquet(path), "\n\n", stamp, by_document=True)


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # not read_text, which would turn \r\n into \n
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text (byte {e.start}): convert it to UTF-8") from e


def _wikitext_rows(text: str) -> list[str]:
    """The rows of the hub's WikiText: a line with its newline, a blank line as the empty string."""
    lines = text.removesuffix("\n").split(
        "\n"
    )  # not splitlines, which also splits at U+2028 and the like
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _read_jsonl(path: pathlib.Path) -> list[str]:
    texts, wanted = [], f'every line must be like {{"{FIELD}": "..."}}'
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(f"{path} line {number} is not JSON ({e.msg}): {wanted}") from e
        if not isinstance(row, dict) or not isinstance(row.get(FIELD), str):
            raise InputError(f"{path} line {number} has no string in a field {FIELD!r}: {wanted}")
        texts.append(row[FIELD])
    return texts


def _read_parquet(path: pathlib.Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = file.read(columns=[FIELD])[FIELD] if FIELD in names else None
    except (pa.ArrowException, OSError) as e:
        raise InputError(
            f"{path} cannot be read as parquet ({str(e).splitlines()[0]}): write it again"
        ) from e
    if column is None:
        raise InputError(
            f"{path} has no column {FIELD!r} (it has {', '.join(names)}): rename the one that holds the documents"
        )
    texts = column.to_pylist()
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path}: column {FIELD!r} must hold a string in every row, without nulls")
    return texts
