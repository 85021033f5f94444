"""What a model answered before: a model and a request decide the answer, so no task is run twice on the same weights."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def digest(*parts: Any) -> str:
    """SHA-256 of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cache_directory() -> pathlib.Path:
    """Where answers are kept unless told otherwise: `topiary/tasks` in XDG_CACHE_HOME, else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "topiary" / "tasks"


class Answers:
    """The answers of one model, a JSON file for every task's requests; nothing is kept without a directory.

    Args:
      model: all that its answers depend on beside the requests, JSON-able.
    """

    def __init__(self, directory: pathlib.Path | None, model: Mapping[str, Any]):
        self._directory, self._model = directory, digest(model)

    def of(
        self,
        kind: str,
        requests: Sequence[Any],
        groups: Iterable[str | None],
        compute: Callable[[list[int]], Sequence[Any]],
    ) -> list[Any]:
        """The answer to each request: read where its whole group is known, the rest computed together and kept.

        Args:
          kind: of the requests; what else decides their answers is in the requests (JSON-able).
          groups: the name of each request's group.
          compute: gives the answers of the requests with these indices.
        """
        members: dict[str | None, list[int]] = {}
        for i, name in enumerate(groups):
            members.setdefault(name, []).append(i)
        files = {
            name: self._file(kind, [requests[i] for i in own]) for name, own in members.items()
        }
        known = {
            name: found
            for name, own in members.items()
            if (found := _read(files[name], len(own))) is not None
        }
        missing = [i for name, own in members.items() if name not in known for i in own]
        answers = dict(zip(missing, compute(missing), strict=True)) if missing else {}
        for name, own in members.items():
            if name in known:
                answers |= dict(zip(own, known[name], strict=True))
            else:
                _write(files[name], [answers[i] for i in own])
        return [answers[i] for i in range(len(requests))]

    def _file(self, kind: str, requests: Sequence[Any]) -> pathlib.Path | None:
        return self._directory and self._directory / f"{digest(self._model, kind, requests)}.json"


def _read(file: pathlib.Path | None, count: int) -> list[Any] | None:
    """The answers in a file; None where it is not there or not whole."""
    try:
        answers = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError):
        return None
    return answers if isinstance(answers, list) and len(answers) == count else None


def _write(file: pathlib.Path | None, answers: Sequence[Any]) -> None:
    if file is None:
        return
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    with contextlib.suppress(
        OSError
    ):  # a full or read-only home directory costs the cache, not the run
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(answers), encoding="utf-8")
        beside.replace(file)
