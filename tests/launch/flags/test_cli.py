"""Flags, flag files, help, and errors as one line with exit code 2."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.flags.cli import Flags, run
from models.errors import InputError


def make() -> Flags:
    f = Flags("launch.example", "Does an example.\n\n    python -m launch.example")
    f.group("Work")
    f.string("name", None, "what it is called")
    f.integer("count", 3, "how many", 1)
    f.number("share", 0.5, "how much")
    f.choice("kind", "a", ["a", "b"], "which")
    f.boolean("fast", True, "hurry")
    return f


def test_values_have_their_types() -> None:
    values = make().parse(["--name=x", "--count=7", "--share=0.25", "--kind=b", "--nofast"])
    assert {k: values[k] for k in ("name", "count", "share", "kind", "fast")} == dict(
        name="x", count=7, share=0.25, kind="b", fast=False
    )


def test_flag_files_nest_take_comments_and_lose_to_later_flags(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.flags", tmp_path / "outer.flags"
    inner.write_text("# a comment\n--count=5\n--name=inner\n")
    outer.write_text(f'--flagfile={inner}\n--name=outer(scorer="x", y=1)\n')
    values = make().parse([f"--flagfile={outer}", "--count=9"])
    assert values["name"] == 'outer(scorer="x", y=1)' and values["count"] == 9


@pytest.mark.parametrize(
    "argv",
    [
        ["--zebra=1"],
        ["--count=many"],
        ["--count=0"],
        ["--kind=c"],
        ["stray"],
        ["--flagfile=/no/such/file"],
        ["--name"],
    ],
    ids=str,
)
def test_a_wrong_flag_is_an_input_error(argv: list[str]) -> None:
    with pytest.raises(InputError):
        make().parse(argv)


def outcome(error: Exception | None, argv: list[str]) -> int:
    def main(values: dict[str, Any]) -> None:
        if error:
            raise error

    return run(make(), main, argv)


def test_an_input_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(None, []) == 0
    assert outcome(InputError("the file is\nbroken: mend it"), []) == 2
    assert capsys.readouterr().err == "error: the file is broken: mend it\n"
    assert outcome(None, ["--zebra"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "zebra" in err and err.count("\n") == 1


def test_debug_brings_the_traceback_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(InputError("bad"), ["--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: bad\n")


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        outcome(ZeroDivisionError(), [])


def test_help_shows_own_flags_in_groups_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(ZeroDivisionError(), ["--help"]) == 0
    out = capsys.readouterr().out
    assert (
        "Does an example" in out
        and "Work:" in out
        and "--count" in out
        and "(default: 3)" in out
        and "<a|b>" in out
    )
    assert "alsologtostderr" not in out and "pdb" not in out
    assert len(out.splitlines()) < 30


def test_given_returns_the_flags_that_differ_from_their_defaults() -> None:
    f = make()
    values = f.parse(["--name=x y", "--nofast", "--count=3"])
    assert f.given(values) == ["--name=x y", "--nofast"]
    assert make().parse(f.given(values)) == values


def test_settings_in_errors_are_shown_as_flags(capsys: pytest.CaptureFixture[str]) -> None:
    error = InputError("is too much", "leave `fast` out, or `nofast`", field="count", value=9)
    assert outcome(error, []) == 2
    assert capsys.readouterr().err == (
        "error: --count=9 is too much: leave --fast out, or --nofast\n"
    )
    assert outcome(InputError("is no flag here", field="window"), []) == 2
    assert capsys.readouterr().err == "error: window is no flag here\n"


def deep(folder: Path) -> str:
    for k in range(3000):
        (folder / f"{k}.flags").write_text(f"--flagfile={folder / f'{k + 1}.flags'}\n")
    return f"--flagfile={folder / '0.flags'}"


def circular(folder: Path) -> str:
    (folder / "x.flags").write_text(f"--flagfile={folder / 'x.flags'}\n")
    return f"--flagfile={folder / 'x.flags'}"


def latin(folder: Path) -> str:
    (folder / "x.flags").write_bytes(b"--name=x # \xe9\n")
    return f"--flagfile={folder / 'x.flags'}"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "x.flags")
    return f"--flagfile={folder / 'x.flags'}"


FAULTS: dict[str, tuple[Callable[[Path], str], str]] = {
    "nested 3000 deep": (deep, "is nested deeper than 50 files"),
    "names itself": (circular, "is nested deeper than 50 files"),
    "not UTF-8": (latin, "is not UTF-8 text (byte 11)"),
    "a pipe": (pipe, "cannot be read (it is a pipe)"),
    "a directory": (lambda d: f"--flagfile={d}", "cannot be read (it is a directory)"),
    "a long name": (lambda d: f"--flagfile={'x' * 300}", "cannot be opened (File name too long)"),
    "no home": (lambda d: "--flagfile=~nobody_here/x", "a home directory that does not exist"),
    "no name": (lambda d: "--flagfile", "is missing its file"),
    "a switch with a value": (lambda d: "--nofast=1", "does not take an argument"),
    "a count without end": (lambda d: f"--count={10**30}", "count"),
    "a count above 31 bits": (lambda d: f"--count={2**31}", "count"),
    "5000 digits": (lambda d: f"--count={'1' * 5000}", "count"),
    "a name of no UTF-8": (lambda d: "--name=\udcff", "is not UTF-8 text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_flags_and_flag_files_are_one_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_argument, says = FAULTS[fault]
    assert outcome(None, [make_argument(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1
    assert len(err) < 1600


def test_a_flag_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.flags").write_bytes(b"\xef\xbb\xbf--count=5\r\n\r\n// none\r\n")
    assert make().parse(["--flagfile", str(tmp_path / "x.flags"), "--nofast"])["count"] == 5


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate"), RuntimeError("RESOURCE_EXHAUSTED: 5 TiB")]
)
def test_memory_that_does_not_suffice_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(error, []) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: give fewer")


def test_an_error_never_sends_control_characters_to_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outcome(InputError("\x1b[31mred\x07 " + "x" * 5000 + " end"), []) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: \\x1b[31mred\\x07 xx") and err.endswith("x end\n")
    assert len(err) < 1600
