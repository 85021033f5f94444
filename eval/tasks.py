"""Zero-shot tasks of lm-evaluation-harness: opened from names or local YAML files, and run on a model."""

import contextlib
import io
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import lm_eval
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eval.answers import digest
from eval.harness import HarnessModel
from models.errors import InputError

SEED = 1234  # of the examples in a prompt, as lm-eval has it
BOOTSTRAP = 1000  # samples behind a standard error that has no formula
GENERATION = {
    "until",
    "do_sample",
    "temperature",
    "top_p",
    "max_gen_toks",
}  # what a generated answer may be asked to follow


class Tasks(NamedTuple):
    """Tasks with their documents. `protocol` has for each its version, documents, examples in a prompt, and the SHA-256 of all that is
    asked and expected."""

    loaded: Mapping[str, Any]
    limit: int | None
    protocol: dict[str, dict[str, Any]]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log, bars and prints; what it has to say comes as an exception. Nothing forks: JAX has threads."""
    levels = {
        log: log.level for log in map(logging.getLogger, ("lm_eval", "datasets", "huggingface_hub"))
    }
    bars, single = datasets.are_progress_bars_disabled(), os.environ.get("DISABLE_MULTIPROC")
    for log in levels:
        log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        os.environ.pop("DISABLE_MULTIPROC") if single is None else os.environ.update(
            DISABLE_MULTIPROC=single
        )


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name or os.sep in name


def _files(name: str) -> list[pathlib.Path]:
    """The YAML files of a path: itself, or those of a directory that do not begin with an underscore, which others include."""
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        found = sorted(
            p
            for p in path.iterdir()
            if p.suffix in (".yaml", ".yml") and not p.name.startswith("_")
        )
        if not found:
            raise InputError(
                f"--tasks={name} has no .yaml file: name a task, a YAML file or a directory of them"
            )
        return found
    if not path.is_file():
        raise InputError(f"--tasks={name}: there is no such file, check the path")
    return [path]


def _beside(folder: pathlib.Path, files: Any) -> Any:
    """`data_files` (a path, a list, or a mapping of them) with relative paths taken from the YAML file's folder."""
    if isinstance(files, Mapping):
        return {split: _beside(folder, own) for split, own in files.items()}
    if isinstance(files, list):
        return [_beside(folder, own) for own in files]
    return files if "://" in files else str((folder / pathlib.Path(files).expanduser()).resolve())


def _config(file: pathlib.Path) -> dict[str, Any]:
    """A local YAML file, its data files found from where it lies."""
    config = load_yaml(file)
    if isinstance(config.get("task"), list) or "group" in config:
        raise InputError(f"--tasks={file} is a group: name the YAML files of its tasks")
    if "task" not in config:
        raise InputError(f"--tasks={file} has no `task:`, the name that its results get: add it")
    kwargs = config.get("dataset_kwargs") or {}
    if "data_files" in kwargs:
        config["dataset_kwargs"] = {
            **kwargs,
            "data_files": _beside(file.parent, kwargs["data_files"]),
        }
    return config


def _opened(name: str, catalogue: TaskManager) -> Mapping[str, Any]:
    """What lm-eval loads for one name or path; InputError with its reason where it cannot."""
    try:
        if _is_path(name):
            return catalogue.load([_config(file) for file in _files(name)])
        known = catalogue.match_tasks([name])
        if not known:
            raise InputError(
                f"--tasks={name}: lm-eval has no such task: `lm-eval ls tasks` lists them; a file is named with .yaml"
            )
        return catalogue.load(known)
    except InputError:
        raise
    except Exception as e:  # of every kind: YAML, templates, data sets, network
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"--tasks={name} cannot be opened ({reason}): check its data, and the network if they are on the hub"
        ) from e


def open_tasks(names: Sequence[str], *, limit: int = 0, num_fewshot: int = -1) -> Tasks:
    """Open tasks and all their documents, and build every request once.

    Args:
      names: of lm-eval's tasks, groups and tags, with wildcards; or paths of YAML files or directories of them (with .yaml or a slash).
      limit: most documents of a task, the first; 0 for all.
      num_fewshot: examples in a prompt; -1 for what the task says, or none.
    Raises InputError for what lm-eval does not know or cannot open, and for tasks that need more than text.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    with _quiet():
        catalogue = TaskManager(include_defaults=not all(map(_is_path, names)))
        for name in names:
            found = _opened(name, catalogue)
            for part, entries in loaded.items():
                entries |= found.get(part, {})
        protocol = {
            name: _prepared(name, task, limit or None, num_fewshot)
            for name, task in loaded["tasks"].items()
        }
    return Tasks(loaded, limit or None, protocol)


def _prepared(name: str, task: Any, limit: int | None, num_fewshot: int) -> dict[str, Any]:
    """Set how a task is run; returns what the protocol says of it."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise InputError(
            f"--tasks: {name} runs code or needs more than text, which is not supported: leave it out"
        )
    if task.OUTPUT_TYPE == "generate_until":
        unknown = normalize_gen_kwargs(task.config.generation_kwargs or {}).keys() - GENERATION
        if unknown:
            raise InputError(
                f"--tasks: {name} asks to generate with {', '.join(sorted(unknown))}, which is not supported"
            )
    own = task.get_config("num_fewshot")
    if own is None or (
        own > 0 and num_fewshot >= 0
    ):  # as lm-eval has it, a task that says 0 means it
        task.set_config("num_fewshot", max(num_fewshot, 0))
    try:
        task.set_fewshot_seed(SEED)
        task.build_all_requests(limit=limit)
        choices = {
            r.doc_id: len(task.doc_to_choice(r.doc))
            for r in task.instances
            if task.OUTPUT_TYPE == "multiple_choice"
        }
        asked = [[r.request_type, r.args, str(task.doc_to_target(r.doc))] for r in task.instances]
    except Exception as e:  # of every kind, from the task's templates and functions
        raise InputError(
            f"--tasks: {name} cannot be put into words ({e}): check its YAML against its documents"
        ) from e
    return {
        "version": task.VERSION,
        "documents": len({r.doc_id for r in task.instances}),
        "num_fewshot": task.get_config("num_fewshot"),
        "chance": sum(1 / n for n in choices.values()) / len(choices)
        if choices
        else None,  # the accuracy of guessing
        "sha256": digest(asked),
    }


def run_tasks(tasks: Tasks, model: HarnessModel) -> dict[str, dict[str, float | None]]:
    """{task or group: {metric: value, metric_stderr: its standard error or None}} of a model; metrics by lm-eval's names.

    A metric of a filter is called `metric,filter`.
    """
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(
            SEED
        )  # again for every model: the draws go on from one document to the next
    with _quiet():
        found = lm_eval.evaluate(
            model,
            dict(tasks.loaded),
            limit=tasks.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    return {
        name: {
            key.removesuffix(",none"): float(value) if isinstance(value, int | float) else None
            for key, value in results.items()
            if "," in key
        }
        for name, results in found["results"].items()
    }
