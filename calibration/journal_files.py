"""Write and read the files of a journal: values of steps, and the index of what counts."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from calibration.digests import stored_digest

INDEX = "journal.json"
COPY = "journal.copy.json"  # without an index nothing else can be trusted
UNFINISHED = "{}.new"  # name of a file while it is being written


class Step(NamedTuple):
    """A step in the journal: a finished one, or a pass that stopped between two blocks.

    Attributes:
      value: File of its value, or of the records of the blocks so far.
      states: Directory of the hidden states of a pass that stopped; None if there are none.
      finished: Whether the step is finished.
      puts: Whether it gives blocks to the sink.
    """

    value: str
    states: str | None
    finished: bool
    puts: bool

    def files(self) -> list[str]:
        """Return the names of its files and directories."""
        return [self.value] if self.states is None else [self.value, self.states]


def write_durably(path: pathlib.Path, data: bytes) -> None:
    """Write a file so that it is complete or absent, even after a crash of the machine.

    Args:
      path: The file.
      data: Its content.
    """
    temporary = path.with_name(UNFINISHED.format(path.name))
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # before the rename: a rename may reach the disk ahead of the data
    os.replace(temporary, path)


def pack_value(value: Any) -> bytes:
    """Serialise a value.

    Args:
      value: Dicts with text keys, lists, numbers, text, None and arrays.
    """
    from flax.serialization import msgpack_serialize

    return msgpack_serialize({"value": value})


def unpack_value(path: pathlib.Path) -> Any:
    """Read the value that `pack_value` serialised.

    Args:
      path: File that holds it.
    """
    from flax.serialization import msgpack_restore

    return msgpack_restore(path.read_bytes())["value"]


def changed_files(directory: pathlib.Path, digests: Mapping[str, str]) -> list[str]:
    """Return the files that are missing or have changed.

    Args:
      directory: The journal's directory.
      digests: SHA-256 of files and directories by their path relative to it.
    """
    return [key for key, value in digests.items() if stored_digest(directory / key) != value]


def write_index(directory: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Replace the index and its copy.

    Args:
      directory: The journal's directory.
      content: JSON-able facts.
    """
    data = _signed(content)
    # The copy first: then only the index can be the older one, or be missing after a kill.
    for name in (COPY, INDEX):
        write_durably(directory / name, data)


def read_index(directory: pathlib.Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Read the index, or its copy if the index is damaged.

    Args:
      directory: The journal's directory; made if it does not exist.

    Returns:
      The content; None if there is none. Names of the files that are damaged or missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # A run killed in its first write leaves only an unfinished index: nothing is lost.
    beginnings = [UNFINISHED.format(name) for name in (COPY, INDEX)]
    if all(path.name in beginnings for path in directory.iterdir()):
        return None, []
    contents = {name: _read(directory / name) for name in (INDEX, COPY)}
    damaged = [name for name, content in contents.items() if content is None]
    content = contents[INDEX] or contents[COPY]
    if damaged == [INDEX] and content and not content["steps"]:
        return content, []  # killed in the first commit, between the two
    return content, damaged


def _signed(content: Mapping[str, Any]) -> bytes:
    """Return content as JSON, with its SHA-256."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({"sha256": digest, "content": content}).encode()


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """Return the content of an index; None if it is damaged or missing."""
    try:
        data = path.read_bytes()
        content = dict(json.loads(data)["content"])
    except (ValueError, TypeError, KeyError, OSError, RecursionError):
        return None
    # Byte for byte, so that no flipped bit is overlooked, in a space or in the digest neither.
    return content if data == _signed(content) else None
