"""Watch what a run does to the disk: a picture of the files before every act.

A process that is killed with SIGKILL leaves the files as they were at that instant. So the picture
before an act is what a kill there leaves, without a process for each.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ACTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.truncate"}

_watcher: Callable[[], None] | None = None
_root = ""


def _is_act(event: str, args: tuple[Any, ...]) -> bool:
    """Return whether an audit event is about to change files below the root."""
    if event == "open":
        path, _, flags = args
        changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        path, changes = args[0] if args else "", event in ACTS
    if not changes or isinstance(path, int):
        return False
    path = os.fsdecode(path)
    # rmtree names files by their directories' descriptors.
    return path.startswith(_root) or (event in ("os.remove", "os.rmdir") and "/" not in path)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    global _watcher
    if _watcher is None or (event != "open" and event not in ACTS) or not _is_act(event, args):
        return
    watcher, _watcher = _watcher, None  # what the watcher does is not watched
    try:
        watcher()
    finally:
        _watcher = watcher


@contextlib.contextmanager
def watched(root: Path, before_act: Callable[[], None]) -> Iterator[None]:
    """Call a function before every act on files below a directory."""
    global _watcher, _root
    if _hook not in _installed:
        sys.addaudithook(_hook)  # for ever: Python has no way to remove it
        _installed.append(_hook)
    _root, _watcher = str(root), before_act
    try:
        yield
    finally:
        _watcher = None


_installed: list[Any] = []


def copy_tree(source: Path, target: Path) -> None:
    """Copy a directory with its links, hard ones too."""
    first: dict[int, str] = {}

    def copy(a: str, b: str) -> str:
        # Orbax's threads remove their lock files meanwhile, so one may be gone.
        with contextlib.suppress(FileNotFoundError):
            inode = os.stat(a).st_ino
            if inode in first:
                os.link(first[inode], b)
            else:
                first[inode] = shutil.copy2(a, b)
        return b

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


def listing(root: Path) -> dict[str, bytes]:
    """Return the content of every file below a directory."""
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }
