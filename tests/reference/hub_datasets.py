"""Data sets as the hub holds them: WikiText-2, C4 and PTB with rows of a test's own."""

import gzip
import io
import json
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from reference.local_hub import LocalHub, Repository

# Id, column, name of a split's file, and the commit or the branch where it lies.
SETS = {
    "wikitext2": (
        "Salesforce/wikitext",
        "text",
        "wikitext-2-raw-v1/{split}-00000-of-00001.parquet",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
    ),
    "c4": (
        "allenai/c4",
        "text",
        "en/c4-{split}.00000-of-{total}.json.gz",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    ),
    "ptb": (
        "ptb-text-only/ptb_text_only",
        "sentence",
        "penn_treebank/{split}/0000.parquet",
        "refs/convert/parquet",
    ),
}


def parquet(columns: Mapping[str, Sequence[object]]) -> bytes:
    """Return a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), buffer)
    return buffer.getvalue()


def json_lines(column: str, rows: Sequence[str]) -> bytes:
    """Return a packed file of lines, as C4 has them."""
    lines = (json.dumps({column: row, "url": f"u{k}"}) + "\n" for k, row in enumerate(rows))
    return gzip.compress("".join(lines).encode(), mtime=0)


def add_dataset(hub: LocalHub, name: str, splits: Mapping[str, Sequence[str]]) -> Repository:
    """Put a data set on a hub, with files of other splits and configurations beside its own.

    Args:
      hub: The hub.
      name: A key of SETS.
      splits: Rows by split.
    """
    dataset, column, path, revision = SETS[name]
    files = {"README.md": b"---\nlicense: other\n---\n", "other/train-0.parquet": b"not read"}
    for split, rows in splits.items():
        total = {"train": "01024", "validation": "00008"}.get(split, "")
        where = path.format(split=split, total=total)
        if where.endswith(".parquet"):
            files[where] = parquet({column: list(rows), "id": list(range(len(rows)))})
        else:
            files[where] = json_lines(column, rows)
    repository = Repository()
    hub.repositories["datasets", dataset] = repository
    repository.commit({"README.md": b"the main branch"})
    if revision.startswith("refs/"):
        repository.commit(files, revision)
    else:
        repository.commits[revision] = files
    return repository
