"""An output directory is complete or absent."""

from pathlib import Path

import pytest

from launch.run.staging import UNFINISHED, staged
from models.errors import InputError


def write(output: Path, text: str, fail: bool = False) -> None:
    with staged(output, "done.json") as directory:
        (directory / "done.json").write_text(text)
        assert not (output / "done.json").exists() or (output / "done.json").read_text() != text
        if fail:
            raise RuntimeError


def test_an_output_appears_complete_and_replaces_an_earlier_result(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        write(out, text)
        assert (out / "done.json").read_text() == text
        assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_the_earlier_result(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write(tmp_path / "out", "first", fail=True)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "out", "first")
    with pytest.raises(RuntimeError):
        write(tmp_path / "out", "second", fail=True)
    assert (tmp_path / "out" / "done.json").read_text() == "first"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_do_not_matter(tmp_path: Path) -> None:
    for kind in ("partial", "replaced"):
        (tmp_path / f".out.{kind}").mkdir()
        (tmp_path / f".out.{kind}" / "junk").touch()
    write(tmp_path / "out", "first")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["done.json"]


def test_foreign_files_are_left_alone_and_an_empty_directory_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for name in ("file", "full"):
        with pytest.raises(InputError, match="not an earlier result"):
            write(tmp_path / name, "x")
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file" / "below", "x")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "x")


@pytest.mark.parametrize("keep", [True, False])
def test_a_failure_leaves_unfinished_work_that_is_worth_keeping(keep: bool, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    with (
        pytest.raises(RuntimeError),
        staged(tmp_path / "out", "done.json", True, lambda work: keep) as directory,
    ):
        (directory / UNFINISHED).mkdir()
        raise RuntimeError
    assert (partial / UNFINISHED).is_dir() == keep and not (tmp_path / "out").exists()
