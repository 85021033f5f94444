"""Cache of a model's answers to task requests, so that no task runs twice on the same weights."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from models.user_cache import cache_folder


def digest(*parts: Any) -> str:
    """Return the SHA-256 of JSON-able values, as hexadecimal digits.

    Args:
      *parts: The values.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cache_directory() -> pathlib.Path:
    """Return the default directory of answers: `topiary/tasks` in XDG_CACHE_HOME or ~/.cache."""
    return cache_folder("tasks")


class AnswerCache:
    """Cache of one model's answers, a JSON file for each group of requests.

    Args:
      directory: Directory of the files; None to keep nothing.
      model: JSON-able values that the answers depend on beside the requests.
    """

    def __init__(self, directory: pathlib.Path | None, model: Mapping[str, Any]):
        self._directory = directory
        self._model = digest(model)

    def get(
        self,
        kind: str,
        requests: Sequence[Any],
        groups: Iterable[str | None],
        compute: Callable[[list[int]], Sequence[Any]],
    ) -> list[Any]:
        """Return the answer to each request, computing those that are not cached.

        A group is read if its whole file is there. The rest is computed in one call and written.

        Args:
          kind: Kind of the requests. Everything else that their answers depend on is in them.
          requests: JSON-able requests.
          groups: Name of each request's group, such as its task.
          compute: Function from the indices of requests to their answers.

        Returns:
          Answers in the order of the requests.
        """
        members: dict[str | None, list[int]] = {}
        for i, name in enumerate(groups):
            members.setdefault(name, []).append(i)
        files = {
            name: self._file(kind, [requests[i] for i in ids]) for name, ids in members.items()
        }
        cached = {name: _read(files[name], len(ids)) for name, ids in members.items()}
        missing = [i for name, ids in members.items() if cached[name] is None for i in ids]
        answers = dict(zip(missing, compute(missing), strict=True)) if missing else {}
        for name, ids in members.items():
            group_answers = cached[name]
            if group_answers is None:
                _write(files[name], [answers[i] for i in ids])
            else:
                answers |= dict(zip(ids, group_answers, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _file(self, kind: str, requests: Sequence[Any]) -> pathlib.Path | None:
        if self._directory is None:
            return None
        return self._directory / f"{digest(self._model, kind, requests)}.json"


def _read(file: pathlib.Path | None, count: int) -> list[Any] | None:
    """Return the answers of a file; None if it is missing, damaged or of another length."""
    if file is None:
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        answers = stored["answers"]
        whole = stored["sha256"] == digest(answers) and len(answers) == count
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return answers if whole else None


def _write(file: pathlib.Path | None, answers: Sequence[Any]) -> None:
    if file is None:
        return
    # Written beside and renamed: another process never reads half a file.
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    # A full or read-only home directory costs the cache, not the run.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        stored = {"sha256": digest(answers), "answers": answers}
        temporary.write_text(json.dumps(stored), encoding="utf-8")
        temporary.replace(file)
