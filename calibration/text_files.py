"""Read local text files: plain text, JSON and parquet, as they are met in the wild."""

import gzip
import io
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from models.errors import first_line
from models.untrusted import (
    UserFile,
    decode,
    has_surrogates,
    parse_row,
    shown_text,
)

PACKABLE = (".txt", ".raw", ".jsonl", ".json")  # suffixes that .gz may follow
SUFFIXES = (*PACKABLE, ".parquet")
COLUMN = "text"  # field of a .jsonl line and column of a .parquet table that hold the documents
MOST_UNPACKED = 1 << 30  # bytes; a few kilobytes of .gz can hold more than any memory
MOST_NAMED = 6  # fields that an error lists


def text_suffix(path: pathlib.Path) -> str | None:
    """Return the suffix that says how to read a file; None if it is not known.

    Args:
      path: The file; `.gz` behind a suffix does not count.
    """
    suffix = path.suffix
    if suffix == ".gz":
        suffix = pathlib.PurePath(path.stem).suffix
        return suffix if suffix in PACKABLE else None
    return suffix if suffix in SUFFIXES else None


def read_documents(file: UserFile, suffix: str) -> list[str]:
    """Read the documents of a `.jsonl`, `.json` or `.parquet` file.

    Args:
      file: The file.
      suffix: One of these suffixes.

    Raises:
      InputError: The file cannot be read, or a document is missing or no text.
    """
    return _read_parquet(file) if suffix == ".parquet" else _read_json(file, suffix)


def read_text(file: UserFile) -> str:
    """Read a text file, packed or not.

    Args:
      file: The file.

    Raises:
      InputError: It cannot be read, unpacked or decoded.
    """
    # Not in text mode, which would turn \r\n into \n.
    if file.path.suffix != ".gz":
        return file.read_text()
    try:
        return decode(_unpack(file.read_bytes()))
    except UnicodeDecodeError as e:
        raise file.error(f"is not UTF-8 text (byte {e.start})", "convert it to UTF-8") from None
    except (EOFError, OSError, zlib.error) as e:
        raise file.error(f"cannot be unpacked ({first_line(e)})", "pack it again") from None
    except OverflowError:
        raise file.error(
            f"holds more than {MOST_UNPACKED >> 20} MiB of text", "give a part of it"
        ) from None


def _unpack(packed: bytes) -> bytes:
    """Unpack gzip; OverflowError if the content is too long."""
    with gzip.open(io.BytesIO(packed)) as stream:
        content = stream.read(MOST_UNPACKED + 1)
    if len(content) > MOST_UNPACKED:
        raise OverflowError
    return content


def wikitext_rows(text: str) -> list[str]:
    """Split WikiText into the hub's rows: lines with their newline, blank lines as empty text.

    Args:
      text: The text of a `.raw` file.
    """
    # Not splitlines, which also splits at U+2028 and others.
    lines = text.removesuffix("\n").split("\n")
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _read_json(file: UserFile, suffix: str) -> list[str]:
    """Read the documents of a `.jsonl` or `.json` file."""
    content, texts = read_text(file), []
    is_array = suffix == ".json" and content.lstrip().startswith("[")
    unit = "item" if is_array else "line"
    wanted = f'write every {unit} as {{"{COLUMN}": "..."}}'
    for number, row in _array(file, content) if is_array else _lines(file, content, wanted):
        text = row.get(COLUMN) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = f" (it has {_names(row)})" if isinstance(row, dict) and row else ""
            raise file.error(f"has no string in field {COLUMN!r} of {unit} {number}{has}", wanted)
        # Scrapers cut texts in the middle of a pair. No tokenizer takes the half that is left.
        if has_surrogates(text):
            raise file.error(
                f"has half of a surrogate pair in {unit} {number}", "put U+FFFD in its place"
            )
        texts.append(text)
    return texts


def _lines(file: UserFile, content: str, wanted: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line of JSON."""
    # Not splitlines, which also splits at U+2028 and others.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():  # such as behind the last newline
            continue
        try:
            yield number, parse_row(line)
        except ValueError as e:
            raise file.error(f"is not JSON in line {number} ({e})", wanted) from None


def _array(file: UserFile, content: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each item of an array of JSON."""
    try:
        yield from enumerate(parse_row(content), start=1)
    except ValueError as e:
        raise file.error(f"is not JSON ({e})", "write an array of objects") from None


def _names(fields: Iterable[str]) -> str:
    """Return the first names of fields or columns."""
    names = list(fields)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(shown_text, names[:MOST_NAMED])) + more


def _read_parquet(file: UserFile) -> list[str]:
    """Read the documents of a `.parquet` file."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            # One column alone: the others of a crawl can be larger than the text.
            read = names.count(COLUMN) == 1
            texts = table.read(columns=[COLUMN])[COLUMN].to_pylist() if read else []
    except Exception as e:  # pyarrow raises its own, OSError, and UnicodeDecodeError
        raise file.error(f"cannot be read as parquet ({first_line(e)})", "write it again") from e
    if names.count(COLUMN) > 1:
        raise file.error(f"has {names.count(COLUMN)} columns {COLUMN!r}", "rename all but one")
    if not read:
        raise file.error(
            f"has no column {COLUMN!r} (it has {_names(names)})",
            "rename the column that holds the documents",
        )
    if not all(isinstance(text, str) for text in texts):
        raise file.error(
            f"has a row without a string in column {COLUMN!r}",
            "fill or remove that row",
        )
    return texts
