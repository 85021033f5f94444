"""Every fault of a user's file, path or number is an InputError on one line."""

import os
import pathlib

import pytest

from models.errors import InputError
from models.untrusted import UserFile, is_count, panics_as_errors, parse_json, user_path

FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "line 1 is not JSON"),
    "cut": (b'{"a": 1', "line 1 is not JSON"),
    "not UTF-8": (b'{"a": "\xe9"}', "byte 7 is not UTF-8 text"),
    "UTF-16 cut short": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "400 digits": (b'{"a": ' + b"1" * 400 + b"}", "an integer of 400 digits"),
    "5000 digits": (b'{"a": -' + b"1" * 5000 + b"}", "an integer of 5001 digits"),
    "65 bits": (b'{"a": 18446744073709551616}', "is beyond 64 bits"),
    "1000 deep": (b"[" * 1000 + b"]" * 1000, "nested deeper than 64 levels"),
    "100 deep": (b'{"a":' * 100 + b"1" + b"}" * 100, "nested deeper than 64 levels"),
    "bottomless": (b"[" * 100_000, "nested deeper than 64 levels"),
    "half a pair": (b'{"a": ["\\ud800"]}', "half of a surrogate pair"),
    "half a pair in a name": (b'{"\\udc00": 1}', "half of a surrogate pair"),
    "a list": (b"[1]", "is not a JSON object"),
    "null": (b"null", "is not a JSON object"),
}


def fails(file: UserFile, says: str) -> None:
    with pytest.raises(InputError) as caught:
        file.read_json()
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert str(file.path) in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_json_are_one_line(fault: str, tmp_path: pathlib.Path) -> None:
    content, says = FAULTS[fault]
    (tmp_path / "x.json").write_bytes(content)
    fails(UserFile(tmp_path / "x.json"), says)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_to_read(encoding: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.json").write_bytes('{"ä": [1, 2.5, null, "\\ud83d\\ude42"]}'.encode(encoding))
    assert UserFile(tmp_path / "x.json").read_json() == {"ä": [1, 2.5, None, "🙂"]}


def test_integers_of_64_bits_and_pairs_of_surrogates_are_read() -> None:
    assert parse_json(f'[{2**64 - 1}, {-(2**63)}, "\\ud83d\\ude42"]') == [2**64 - 1, -(2**63), "🙂"]


def make_place(kind: str, place: pathlib.Path) -> None:
    """Put something that is no file there."""
    if kind == "a pipe":
        os.mkfifo(place)
    elif kind == "a directory":
        place.mkdir()
    elif kind == "a device":
        place.symlink_to("/dev/zero")
    elif kind == "symbolic links":
        place.symlink_to(place.name)


@pytest.mark.parametrize("kind", ["a pipe", "a directory", "a device", "symbolic links", "exist"])
def test_what_is_no_file_is_named_and_never_waited_for(kind: str, tmp_path: pathlib.Path) -> None:
    make_place(kind, tmp_path / "x")
    fails(UserFile(tmp_path / "x"), kind)


def test_a_file_that_a_setting_names_is_that_settings_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"^calibration=\S+ does not exist: check the path$"):
        UserFile(tmp_path / "x", "calibration").check()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("~nobody_here/x", "names a home directory that does not exist"),
        ("x" * 300, "File name too long"),
        ("x/" * 3000, "File name too long"),
        ("a\0b", "cannot be opened"),
    ],
)
def test_paths_that_cannot_be_looked_up_are_refused(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        user_path(name, "output")


def test_nothing_need_exist_where_a_path_points(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x/y", "output") == tmp_path / "x/y"


@pytest.mark.parametrize("value", [0, -1, 2**31, 10**400, True, 1.0, "1", None, [1]])
def test_a_count_is_a_positive_integer_of_31_bits(value: object) -> None:
    assert not is_count(value) and is_count(1) and is_count(2**31 - 1)


def test_a_panic_of_a_rust_library_is_an_error() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ValueError, match="index out of bounds"), panics_as_errors():
        raise panic("index out of bounds")
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt
