"""An output directory is complete or absent, wherever it lies and whenever a run is killed."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.run.places import check_free, check_space
from launch.run.staging import alone, staged
from models.errors import InputError
from reference.disk_acts import copy_tree, listing, watched

MARKER = "done.json"


def write(output: Path, text: str, fail: BaseException | None = None) -> None:
    """Write a result of two files, as a run that resumes does."""
    with staged(output, MARKER, resume=True, keep=lambda work: True) as stage:
        stage.work.mkdir(exist_ok=True)
        (stage.work / "journal").write_text("half")
        (stage.result / "weights").write_text(text)
        (stage.result / MARKER).write_text(text)
        (stage.result / "config.json").write_text(text)
        if fail:
            raise fail


def is_whole(output: Path, text: str) -> bool:
    return listing(output) == dict.fromkeys(("weights", MARKER, "config.json"), text.encode())


@pytest.fixture(params=["absent", "empty", "earlier", "earlier, in place", "dangling link", "link"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an output that may be written, in `tmp_path / "root"`."""
    root = tmp_path / "root"
    root.mkdir()
    out = root / "out"
    if request.param == "empty":
        out.mkdir()
    elif request.param.startswith("earlier"):
        write(out, "before")
        (out / "more").touch()
    elif "link" in request.param:
        out.symlink_to(root / "target")
        if request.param == "link":
            (root / "target").mkdir()
    if request.param == "earlier, in place":
        monkeypatch.setattr("launch.run.places._can_be_renamed", lambda directory: False)
    return out


def test_an_output_appears_complete_and_replaces_an_earlier_result(output: Path) -> None:
    names = sorted(p.name for p in output.parent.iterdir())
    linked = output.is_symlink()
    for text in ("first", "second"):
        write(output, text)
        assert is_whole(output, text) and output.is_symlink() == linked
    left = sorted({*names, "out", *(["target"] if linked else [])})
    assert sorted(p.name for p in output.parent.iterdir()) == left


def test_a_kill_before_any_act_is_mended_by_the_next_run(output: Path, tmp_path: Path) -> None:
    """What is there after a kill is a whole result, or what the next run completes."""
    root, album = output.parent, tmp_path / "album"
    taken: list[Path] = []

    def take() -> None:
        copy_tree(root, album / str(len(taken)))
        taken.append(album / str(len(taken)))

    with watched(root, take):
        write(output, "now")
    want, beside = listing(output), sorted(p.name for p in root.iterdir())
    assert len(taken) > 12
    for picture in taken:
        shutil.rmtree(root)
        copy_tree(picture, root)
        if (output / MARKER).is_file() and not any(output.glob(".*")):
            assert is_whole(output, "now") or (output / "more").exists()
        write(output, "now")
        assert listing(output) == want, picture
        assert sorted(p.name for p in root.iterdir()) == beside


def test_a_result_that_was_complete_is_there_after_any_later_run(tmp_path: Path) -> None:
    """A run killed between its last renames has lost nothing, even if the next one fails."""
    write(tmp_path / "out", "first")
    (tmp_path / "out").rename(tmp_path / ".out.complete")
    with pytest.raises(RuntimeError):
        write(tmp_path / "out", "second", RuntimeError())
    assert is_whole(tmp_path / "out", "first")


def test_a_failure_leaves_the_earlier_result_and_the_unfinished_work(output: Path) -> None:
    before = listing(output)
    with pytest.raises(RuntimeError):
        write(output, "new", RuntimeError())
    now = listing(output)
    assert {k: v for k, v in now.items() if not k.startswith(".unfinished")} == before
    work = [p for p in output.parent.rglob("*unfinished*") if p.is_dir()]
    assert len(work) == 1 and (work[0] / "journal").is_file()


def test_a_failure_leaves_nothing_that_is_not_worth_keeping(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "out", MARKER) as stage:
        stage.work.mkdir()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_do_not_matter(tmp_path: Path) -> None:
    for kind in ("partial", "replaced", "removed"):
        (tmp_path / f".out.{kind}").mkdir()
        (tmp_path / f".out.{kind}" / "junk").touch()
    write(tmp_path / "out", "first")
    assert is_whole(tmp_path / "out", "first")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_working_directory_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    for text in ("first", "second"):
        write(Path("."), text)
        assert is_whole(tmp_path, text) and tmp_path.stat().st_ino == inode


@pytest.fixture(params=["tmpfs", "bind"])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Return an empty mount point whose name has a space; skip without the right to mount."""
    point, source = tmp_path / "mount point", tmp_path / "source"
    point.mkdir()
    source.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)]
    if request.param == "bind":
        command = ["mount", "--bind", str(source), str(point)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    yield point
    subprocess.run(["umount", str(point)], check=True)


@pytest.mark.slow
def test_a_mount_point_is_written_in_place(mount: Path) -> None:
    beside = sorted(p.name for p in mount.parent.iterdir())
    for text in ("first", "second"):
        write(mount, text)
        assert is_whole(mount, text)
    assert sorted(p.name for p in mount.parent.iterdir()) == beside


def test_a_new_file_system_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    write(tmp_path / "out", "x")
    assert (tmp_path / "out" / "lost+found").is_dir() and (tmp_path / "out" / "weights").is_file()


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for name in ("file", "full", "pipe", "loop"):
        with pytest.raises(InputError, match="not an earlier result"):
            write(tmp_path / name, "x")
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file" / "below", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "loop", "pipe"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (os.fsdecode(b"caf\xe9"), "not valid UTF-8"),
        ("n" * 250, "too long a name"),  # ours beside it have twelve bytes more
        ("n" * 300, "too long a name"),
        ("/".join(["n" * 200] * 20), "too long a name"),
        ("a\0b", "cannot be written"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused_before_any_work(
    name: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        check_free(tmp_path / name, MARKER)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out", "deep/out", "there"])
def test_a_place_without_permission_is_refused_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        check_free(tmp_path / name, MARKER)


def test_a_deleted_working_directory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\)"):
        check_free(Path("out"), MARKER)
    monkeypatch.chdir(tmp_path)


class RustError(Exception):
    """Stands for the errors of libraries that give the system's number in their text."""


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota is used up"),
        (OSError(errno.EFBIG, "File too large"), "larger than"),
        (RustError("I/O error: Disk quota exceeded (os error 122)"), "quota is used up"),
        (RuntimeError("tensorstore: [OS error 28: No space left on device]"), "no space left"),
        (OSError("5242880 requested and 131072 written"), "no space left"),
        (RustError("I/O error: Permission denied (os error 13)"), "Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_a_disk_that_takes_no_more_is_an_error_and_keeps_the_work(
    failure: Exception, says: str, tmp_path: Path
) -> None:
    wrapped = ExceptionGroup("several writers", [ValueError("other"), failure])
    for error in (failure, wrapped):
        with pytest.raises(InputError, match=f"cannot be written.*{says}"):
            write(tmp_path / "out", "x", error)
        assert (tmp_path / ".out.unfinished" / "journal").is_file()
        assert [p.name for p in tmp_path.iterdir()] == [".out.unfinished"]


def test_a_disk_elsewhere_that_is_full_is_named(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/states.npy")
    with pytest.raises(InputError, match=r"^/elsewhere/states\.npy cannot be written: no space"):
        write(tmp_path / "out", "x", full)


def test_other_failures_keep_their_type(tmp_path: Path) -> None:
    for failure in (
        ValueError("a defect"),
        FileNotFoundError(2, "No such file", "/elsewhere"),
        PermissionError(13, "Permission denied", "/elsewhere"),
    ):
        with pytest.raises(type(failure)):
            write(tmp_path / "out", "x", failure)


def test_a_parent_that_is_removed_meanwhile_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="was removed while the run wrote to it"),
        staged(tmp_path / "parent" / "out", MARKER) as stage,
    ):
        shutil.rmtree(tmp_path / "parent")
        (stage.result / MARKER).write_text("x")


def test_a_full_disk_is_foreseen(tmp_path: Path) -> None:
    written = tmp_path / "shard"
    written.write_bytes(bytes(1000))
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError, match="MiB free, and the result takes"):
        check_space(tmp_path, free + 2**30, [])
    check_space(tmp_path, 2**20, [])
    check_space(tmp_path, 1000, [written])


def test_a_sweep_locks_its_directory_wherever_that_is(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "target")
    with (
        alone(tmp_path / "out"),
        pytest.raises(InputError, match="another run is writing it"),
        alone(tmp_path / "target"),
    ):
        pass
    assert not list((tmp_path / "target").iterdir())


def test_two_runs_do_not_write_one_place(output: Path) -> None:
    with (
        staged(output, MARKER, resume=True),
        pytest.raises(InputError, match="another run is writing it"),
    ):
        write(output, "x")
