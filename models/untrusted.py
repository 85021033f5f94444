"""Files, JSON and counts of users, read so that every fault in them is an `InputError`.

Everything that reads a file of the user goes through here. Three kinds of fault are covered: paths
that cannot be opened, text and JSON that Python's own readers choke on, and numbers that would
build something without end.
"""

import codecs
import contextlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from models.errors import InputError, first_line

MOST = 2**31 - 1  # largest count: arrays are indexed with 32 bits
LARGEST = 3.4e38  # above it a number is infinite in float32
MOST_BLOCKS = 10_000  # the deepest published models have about a thousand
MOST_JSON_BYTES = 1 << 28  # far above any index of shards; the text is held as Python objects
DEEPEST_JSON = 64  # levels; configurations have five, and writing one again must not overflow
LONGEST_INTEGER = 20  # digits; 64 bits need no more
LONGEST_SHOWN = 60  # characters of a value in an error message

# Half of a UTF-16 pair: a code point that JSON's escapes can write and that no text may hold.
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {
    stat.S_ISDIR: "a directory",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}
# Byte-order marks by encoding. UTF-32 comes first: its mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class UserFile(NamedTuple):
    """A file that a setting names, or that lies in a directory which one names.

    Attributes:
      path: The file.
      field: Setting that names the file itself; empty for a file of a model's directory.
      remedy: Remedy for a file that cannot be read or has the wrong content.
    """

    path: pathlib.Path
    field: str = ""
    remedy: str = "fetch the checkpoint again"

    def error(self, reason: str, remedy: str = "") -> InputError:
        """Return the error for this file.

        Args:
          reason: What is wrong with it, a clause whose subject is the file.
          remedy: What the user can do about it; empty for the file's own remedy.
        """
        if self.field:
            return InputError(reason, remedy or self.remedy, field=self.field, value=self.path)
        return InputError(f"{self.path} {reason}", remedy or self.remedy)

    def check(self) -> None:
        """Check that this is a file which exists.

        Raises:
          InputError: It does not exist, or it is a directory, a pipe, a device or out of reach.
        """
        try:
            mode = self.path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise self.error("does not exist", "check the path") from None
        except (OSError, ValueError) as e:
            raise self.error(f"cannot be read ({_reason(e)})", "check the path") from None
        # A pipe would block for ever, and a device never ends.
        kind = next((name for is_kind, name in _KINDS.items() if is_kind(mode)), None)
        if kind:
            raise self.error(f"cannot be read (it is {kind})", "name a file")

    def read_bytes(self) -> bytes:
        """Return the content.

        Raises:
          InputError: The file cannot be read.
        """
        self.check()
        try:
            return self.path.read_bytes()
        except OSError as e:
            raise self.error(f"cannot be read ({_reason(e)})", "check its permissions") from None

    def read_text(self) -> str:
        """Return the content as text: UTF-8, or what a byte-order mark says, without the mark.

        Raises:
          InputError: The file cannot be read or is no such text.
        """
        try:
            return decode(self.read_bytes())
        except UnicodeDecodeError as e:
            raise self.error(f"is not UTF-8 text (byte {e.start})", "convert it to UTF-8") from None

    def read_json(self, kind: type = dict) -> Any:
        """Return the content as JSON; see `parse_json`.

        Args:
          kind: Type that the content has.

        Raises:
          InputError: The file cannot be read, is no JSON, or its content is of another type.
        """
        return self._read_json(kind, parse_json)

    def read_fields(self) -> dict[str, Any]:
        """Return a JSON object of which single fields are used; see `parse_row`.

        Raises:
          InputError: The file cannot be read or is no JSON object.
        """
        return self._read_json(dict, parse_row)

    def _read_json(self, kind: type, parse: Callable[[str], Any]) -> Any:
        """Read JSON of a type with one of the parsers."""
        content = self.read_bytes()
        try:
            if len(content) > MOST_JSON_BYTES:
                raise ValueError(f"it has {len(content)} bytes")
            value = parse(decode(content))
        except UnicodeDecodeError as e:
            raise self.error(f"cannot be read (byte {e.start} is not UTF-8 text)") from None
        except ValueError as e:
            raise self.error(f"cannot be read ({first_line(e)})") from None
        if not isinstance(value, kind):
            raise self.error(f"is not a JSON {'object' if kind is dict else kind.__name__}")
        return value


def _reason(error: Exception) -> str:
    """Return the operating system's reason without its number and path."""
    return getattr(error, "strerror", None) or first_line(error)


def user_path(name: str, field: str) -> pathlib.Path:
    """Return the path that a setting names, with `~` replaced by the home directory.

    Args:
      name: The path as the user wrote it; nothing need exist there.
      field: The setting.

    Returns:
      Path that the operating system can look up.

    Raises:
      InputError: The path is too long, out of reach, or has a home directory that does not exist.
    """
    try:
        path = pathlib.Path(name).expanduser()
        os.stat(path)
    except RuntimeError:
        raise InputError(
            "names a home directory that does not exist",
            "write the whole path",
            field=field,
            value=shown_text(name),
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        pass  # the caller knows whether something must be there
    except (OSError, ValueError) as e:  # ValueError: a null byte
        raise InputError(
            f"cannot be opened ({_reason(e)})",
            "check the path",
            field=field,
            value=shown_text(name),
        ) from None
    return path


def decode(content: bytes) -> str:
    """Decode text: UTF-8, or what a byte-order mark says, without the mark.

    Args:
      content: The bytes.

    Raises:
      UnicodeDecodeError: The bytes are no such text.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding)
    return content.decode("utf-8")


def parse_json(text: str) -> Any:
    """Parse JSON whose values can be used and written again without a fault.

    Args:
      text: The JSON.

    Raises:
      ValueError: It is no JSON, is nested too deeply, or has an integer beyond 64 bits or half of a
        surrogate pair.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as e:
        raise ValueError(f"line {e.lineno} is not JSON: {e.msg}") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST_JSON} levels") from None
    # A loop rather than recursion, so that the check itself cannot overflow.
    waiting = [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, str) and has_surrogates(node):
            raise ValueError(f"the text {shown(node)} has half of a surrogate pair")
        if isinstance(node, dict | list):
            if depth == DEEPEST_JSON:
                raise ValueError(f"it is nested deeper than {DEEPEST_JSON} levels")
            children = [*node, *node.values()] if isinstance(node, dict) else node
            waiting += [(child, depth + 1) for child in children]
    return value


def _integer(digits: str) -> int:
    """Convert the digits of an integer of JSON."""
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    value = int(digits)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"its integer {digits} is beyond 64 bits")
    return value


def parse_row(text: str) -> Any:
    """Parse JSON of which single fields are used; the others may hold anything.

    Args:
      text: The JSON, such as a line of a `.jsonl` file. Its integers become floats.

    Raises:
      ValueError: It is no JSON or is nested too deeply.
    """
    try:
        # float takes any number of digits.
        return json.loads(text, parse_int=float)
    except json.JSONDecodeError as e:
        raise ValueError(e.msg) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def has_surrogates(text: str) -> bool:
    """Return True if a text has half of a surrogate pair, which no encoding can write.

    Args:
      text: The text.
    """
    return not text.isascii() and _SURROGATE.search(text) is not None


def is_count(value: Any, least: int = 1, most: int = MOST) -> bool:
    """Return True for an integer within bounds; True and False are none.

    Args:
      value: Value from a file or a flag.
      least: Smallest count.
      most: Largest count.
    """
    return type(value) is int and least <= value <= most


def shown(value: Any) -> str:
    """Return a value's short text for an error message.

    Args:
      value: Value from a file, of any size.
    """
    return shown_text(repr(value))


def shown_text(text: str) -> str:
    """Return the beginning of a text for an error message.

    Args:
      text: The text.
    """
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def is_panic(error: BaseException) -> bool:
    """Return True for a panic of a Rust library, which is no `Exception`.

    Args:
      error: Any exception.
    """
    # The class is made by each library for itself, so its name is all that they share.
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of a Rust library, which is no `Exception`, as a ValueError."""
    try:
        yield
    except BaseException as e:
        if not is_panic(e):
            raise
        raise ValueError(str(e)) from e
