"""Read text: WikiText-2, C4 and PTB from the hub as the papers read them, and local files."""

import fnmatch
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from calibration.text_files import (
    SUFFIXES,
    read_documents,
    read_text,
    text_suffix,
    wikitext_rows,
)
from models.checkpoint.hub_client import relative_files, snapshot
from models.checkpoint.hub_errors import Repository
from models.errors import first_line
from models.untrusted import UserFile, user_path

Purpose = Literal["calibration", "evaluation"]
SETTINGS: dict[Purpose, str] = {  # the setting that names a source, for error messages
    "calibration": "calibration",
    "evaluation": "eval_data",
}
BLANK_LINE = "\n\n"


class Corpus(NamedTuple):
    """Texts, and the protocol for reading windows from them.

    Attributes:
      texts: The texts.
      join: Text between two of them where they are read as one stream.
      stamp: Fields of the report that identify the data.
      by_document: True if calibration draws a text and then a window in it; False if it draws
        windows of the stream.
      special_tokens: True to tokenize with the tokenizer's own BOS and EOS.
      max_windows: Most windows that the protocol evaluates; 0 for all.
      joins_short: True to draw windows of the stream where no text is as long as a window.
    """

    texts: Sequence[str]
    join: str
    stamp: dict[str, Any]
    by_document: bool = False
    special_tokens: bool = False
    max_windows: int = 0
    joins_short: bool = False


class HubPart(NamedTuple):
    """The part of a hub data set that one purpose reads.

    Attributes:
      split: Name of the split.
      files: Pattern of its files in the repository.
      join: As in `Corpus`.
      by_document: As in `Corpus`.
      max_texts: Number of texts to read from the start; None for all.
      max_windows: As in `Corpus`.
    """

    split: str
    files: str
    join: str
    by_document: bool = False
    max_texts: int | None = None
    max_windows: int = 0


class HubDataset(NamedTuple):
    """A data set of the hub, at a fixed revision.

    Attributes:
      dataset: Its id.
      config: Its configuration; None if it needs none.
      revision: A commit or a branch.
      column: Column of the texts.
      calibration: The part to calibrate on.
      evaluation: The part to evaluate on.
    """

    dataset: str
    config: str | None
    revision: str
    column: str
    calibration: HubPart
    evaluation: HubPart


# The recipes are those of `get_loaders` of SparseGPT (datautils.py) and Wanda (lib/data.py). The
# hub has changed since: ids have owners now, C4 needs no configuration beside its file, and PTB
# was a loading script, which is no longer run, so the hub's own conversion is read instead.
HUB = {
    "wikitext2": HubDataset(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "text",
        HubPart("train", "wikitext-2-raw-v1/train*.parquet", join=" "),
        HubPart("test", "wikitext-2-raw-v1/test*.parquet", join="\n\n"),
    ),
    "c4": HubDataset(
        "allenai/c4",
        None,
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        "text",
        HubPart("train", "en/c4-train.00000-of-01024.json.gz", join=" ", by_document=True),
        HubPart(
            "validation",
            "en/c4-validation.00000-of-00008.json.gz",
            join=" ",
            max_texts=1100,  # joined into one stream, from which the papers
            max_windows=256,  # read this many windows of 2048 tokens
        ),
    ),
    "ptb": HubDataset(
        "ptb-text-only/ptb_text_only",
        None,
        "refs/convert/parquet",
        "sentence",
        HubPart("train", "penn_treebank/train/0000.parquet", join=" "),
        HubPart("test", "penn_treebank/test/0000.parquet", join=" "),
    ),
}


def load_corpus(source: str, purpose: Purpose) -> Corpus:
    """Load the texts of a source.

    Args:
      source: Name of a hub data set, or path of a local file.
      purpose: What the texts are for; it decides the split and how texts are joined.

    Returns:
      The texts and the protocol for reading windows from them.

    Raises:
      InputError: The source does not exist or cannot be read.
    """
    if source in HUB:
        return load_hub(source, purpose)
    return load_file(user_path(source, SETTINGS[purpose]), purpose)


def load_hub(name: str, purpose: Purpose) -> Corpus:
    """Load a data set of `HUB`: download its file, or read it from the hub's cache.

    Args:
      name: Key of `HUB`.
      purpose: As for `load_corpus`.

    Returns:
      As `load_corpus` returns.

    Raises:
      InputError: The data set cannot be reached, or the hub no longer has the file.
    """
    source = HUB[name]
    part = source.calibration if purpose == "calibration" else source.evaluation
    repository = Repository(source.dataset, source.revision, "dataset", SETTINGS[purpose], name)

    def choose(files: Sequence[str]) -> list[str]:
        found = fnmatch.filter(files, part.files)
        if found:
            return found
        raise repository.error(
            f"cannot be read: {source.dataset} has no {part.files} at {source.revision}",
            f"give a file of your own instead ({', '.join(SUFFIXES)})",
        )

    directory = snapshot(repository, choose)
    files = sorted(str(directory / file) for file in choose(relative_files(directory)))
    try:
        rows = _read_rows("parquet" if files[0].endswith(".parquet") else "json", files)
        # The papers tokenize hub texts with the tokenizer's defaults, BOS included.
        texts = rows[source.column]
    except Exception as e:  # datasets and pyarrow each raise their own
        raise repository.error(
            f"cannot be read ({source.dataset}: {first_line(e)})",
            f"remove {directory} to fetch it again",
        ) from e
    if part.max_texts is not None:
        texts = list(itertools.islice(texts, part.max_texts))
    stamp = {
        "dataset": source.dataset,
        "config": source.config,
        "file": part.files,
        "revision": source.revision,
        "commit": directory.name,  # which the revision stood for
        "split": part.split,
    }
    return Corpus(
        texts,
        part.join,
        stamp,
        part.by_document,
        special_tokens=True,
        max_windows=part.max_windows,
    )


def _read_rows(reader: str, files: list[str]) -> Any:
    """Read files into rows that lie in a file of the cache of `datasets`, not in memory."""
    import datasets  # here, because its import takes seconds that local files need not pay

    quiet = datasets.are_progress_bars_disabled()
    # Its bars fill a log with hundreds of lines.
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(reader, data_files=files, split="train")
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def check_source(source: str, purpose: Purpose) -> None:
    """Check that a source has a known name, or is a text file that exists.

    Args:
      source: As for `load_corpus`.
      purpose: What the texts are for.

    Raises:
      InputError: It is neither.
    """
    if source not in HUB:
        _text_file(user_path(source, SETTINGS[purpose]), purpose)


def _text_file(path: pathlib.Path, purpose: Purpose) -> tuple[UserFile, str]:
    """Return a text file that exists, and the suffix that says how to read it."""
    file = UserFile(path, SETTINGS[purpose], "check the file")
    suffix = text_suffix(path)
    if suffix is None:
        names = ", ".join(["embedded", *HUB])
        suffixes = ", ".join([".npy", *SUFFIXES])
        # Only calibration takes text that the model writes.
        own = ", or self" if purpose == "calibration" else ""
        remedy = f"give one of {names}, or a file {suffixes}{own}"
        raise file.error("is no known data source", remedy)
    file.check()
    return file, suffix


def load_file(path: pathlib.Path, purpose: Purpose) -> Corpus:
    """Load a local text file, by its suffix.

    - `.txt`: One text, unchanged.
    - `.raw`: WikiText's own format, split into the rows of `wikitext2` and joined as these are.
    - `.jsonl`, `.json` (field `text`) and `.parquet` (column `text`): Documents. Calibration draws
      from them as from C4; evaluation joins them by a blank line. Where no document is as long as a
      window, calibration draws from all of them, joined by blank lines. A `.json` file is an array
      of objects, or lines like those of `.jsonl`.

    All but `.parquet` may be packed as `.gz`. Text is UTF-8, or what a byte-order mark says.

    Args:
      path: The file.
      purpose: As for `load_corpus`.

    Returns:
      As `load_corpus` returns.

    Raises:
      InputError: The file does not exist, has another suffix, or cannot be read.
    """
    file, suffix = _text_file(path, purpose)
    stamp = {"dataset": path.name}
    if suffix == ".txt":
        return Corpus([read_text(file)], "", stamp)
    if suffix == ".raw":
        join = " " if purpose == "calibration" else BLANK_LINE
        return Corpus(wikitext_rows(read_text(file)), join, stamp)
    texts = read_documents(file, suffix)
    return Corpus(texts, BLANK_LINE, stamp, by_document=True, joins_short=True)
