"""Download from the Hugging Face hub: retries, the cache, progress in bytes, errors in one line."""

import contextlib
import glob
import logging
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from models.checkpoint.hub_errors import Repository, cause_of, explained, is_transient
from models.errors import InputError

WAITS = (1.0, 2.0, 4.0)  # seconds before each further try
# Called with the bytes that have arrived and those that are wanted in all.
Progress = Callable[[int, int], None]
# Makes a context that shows the progress of a download, from its description.
Show = Callable[[str], contextlib.AbstractContextManager[Progress]]
T = TypeVar("T")
_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)


class Source(NamedTuple):
    """Origin of a directory in the hub's cache.

    Attributes:
      repository: Id of the repository, owner/name.
      commit: SHA of the commit.
    """

    repository: str
    commit: str


@contextlib.contextmanager
def reporting(show: Show) -> Iterator[None]:
    """Show the progress of all downloads within the context.

    Args:
      show: Maps what is downloaded to a context, in which it is called as bytes arrive.
    """
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


def source_of(path: pathlib.Path) -> Source | None:
    """Return where a directory of the hub's cache comes from; None for any other.

    Args:
      path: A directory, or a file in it.
    """
    # The cache's own layout: models--owner--name/snapshots/COMMIT.
    match = re.search(
        r"(?:models|datasets)--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(?:/|$)", path.as_posix()
    )
    return Source(f"{match[1]}/{match[2]}", match[3]) if match else None


def snapshot(
    repository: Repository,
    choose: Callable[[Sequence[str]], Sequence[str]],
) -> pathlib.Path:
    """Download files of a repository, or find them in the cache.

    A hub that is busy, or a connection that breaks, is tried again a few times. Files that have
    arrived are not fetched twice, and a body that was cut goes on where it ended. A hub that cannot
    be asked does not matter where the cache holds the files.

    Args:
      repository: The repository.
      choose: Maps the paths of all files to the wanted ones; raises InputError if one is missing.

    Returns:
      Directory in the hub's cache, see `source_of`.

    Raises:
      InputError: The hub does not deliver the files, and the cache lacks them.
    """

    def fetch() -> pathlib.Path:
        try:
            return _fetch(repository, choose)
        except InputError:
            raise
        except Exception:
            cached = _cached(repository, choose)
            if cached is None:
                raise
            return cached

    with quiet():
        try:
            return retried(fetch, f"{repository.name}: the hub failed")
        except InputError:
            raise
        except Exception as e:  # each client, and each of its versions, raises its own
            raise explained(e, repository) from e


def retried(call: Callable[[], T], failure: str) -> T:
    """Call a function of the hub's client, a few times where the next try may succeed.

    Args:
      call: The function.
      failure: Beginning of the line that is logged before each further try.

    Raises:
      Exception: The last try failed.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as e:
            if not is_transient(e):
                raise
            logging.getLogger(__name__).warning("%s (%s); trying again", failure, cause_of(e))
            time.sleep(wait)
    return call()


def _fetch(
    repository: Repository, choose: Callable[[Sequence[str]], Sequence[str]]
) -> pathlib.Path:
    """Ask the hub for the list of files, and download those that the cache lacks."""
    from huggingface_hub import HfApi, snapshot_download

    info: Any = HfApi().repo_info(
        repository.name,
        revision=repository.revision,
        repo_type=repository.kind,
        files_metadata=True,
    )
    files = {file.rfilename: file for file in info.siblings or ()}
    wanted = choose(list(files))
    missing = _missing_bytes(repository, [files[path] for path in wanted])
    show = _SHOW.get()
    with contextlib.ExitStack() as stack:
        progress: Progress = lambda done, total: None  # noqa: E731
        if show is not None and missing:
            progress = stack.enter_context(show(f"downloading {repository.name}"))
        # By the name of the revision, not by its commit: the client notes which commit it stands
        # for, so that the name can be found in the cache without a network.
        directory = snapshot_download(
            repository.name,
            revision=repository.revision,
            repo_type=repository.kind,
            allow_patterns=[glob.escape(path) for path in wanted],
            tqdm_class=_bar(progress, missing),
        )
    return pathlib.Path(directory)


def _missing_bytes(repository: Repository, files: Sequence[Any]) -> int:
    """Return the bytes of the files whose contents are not in the cache.

    Args:
      repository: The repository.
      files: The hub's record of each file.
    """
    from huggingface_hub import constants

    # The cache's own layout. Contents have the same name in every commit.
    folder = f"{repository.kind}s--{repository.name.replace('/', '--')}"
    blobs = pathlib.Path(constants.HF_HUB_CACHE) / folder / "blobs"
    names = [(file.lfs["sha256"] if file.lfs else file.blob_id) or "" for file in files]
    missing = [not name or not (blobs / name).exists() for name in names]
    # A mirror may not tell the size: one byte stands for a file that has some.
    sizes = [1 if file.size is None else file.size for file in files]
    return sum(size for size, is_new in zip(sizes, missing, strict=True) if is_new)


def _cached(
    repository: Repository, choose: Callable[[Sequence[str]], Sequence[str]]
) -> pathlib.Path | None:
    """Return the directory in the cache if it holds all wanted files; None if not."""
    from huggingface_hub import snapshot_download

    try:
        path = pathlib.Path(
            snapshot_download(
                repository.name,
                revision=repository.revision,
                repo_type=repository.kind,
                allow_patterns=[],  # no file is asked for: which are there is looked at below
                local_files_only=True,
            )
        )
        # A directory may be there for fewer files, or from a download that was interrupted.
        wanted = choose(_listed(repository, path))
    except Exception:
        return None
    return path if all((path / file).is_file() for file in wanted) else None


def _listed(repository: Repository, path: pathlib.Path) -> list[str]:
    """Return the paths of all files of a repository, as far as the cache knows them."""
    try:
        # Older clients keep no list.
        from huggingface_hub import get_cached_repo_tree

        tree = get_cached_repo_tree(repository.name, repo_type=repository.kind, revision=path.name)
        return [file.path for file in tree]
    except Exception:
        return relative_files(path)


def relative_files(directory: pathlib.Path) -> list[str]:
    """List the files of a directory and its folders, by their paths in it.

    Args:
      directory: The directory.
    """
    return [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]


def _bar(progress: Progress, total: int) -> type:
    """Return a class of progress bars for the client, which prints nothing and reports bytes."""
    from huggingface_hub.utils import tqdm

    arrived: dict[int, int] = {}

    class Bar(tqdm):
        """A bar of the client. Several may count the same bytes, and one counts files."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            """Count bytes and report them."""
            self.n += n or 0
            if self._counts_bytes:
                arrived[id(self)] = int(self.n)
                done = max(arrived.values())
                progress(done, max(total, done))

    return Bar


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of the hub's client."""
    import huggingface_hub  # noqa: F401, it sets its level when it is imported

    # It logs every retry. Offline that buries the one line that says what is wrong.
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
