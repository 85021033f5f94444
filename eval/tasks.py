"""Zero-shot tasks of lm-evaluation-harness, opened by name or from local YAML files."""

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
from models.errors import InputError, first_line
from models.untrusted import user_path

# Seed of the examples in a prompt, lm-eval's own.
SEED = 1234
# Resamples for a standard error without a formula.
BOOTSTRAP = 1000
# Generation settings that the adapter supports.
GENERATION_SETTINGS = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}


class Tasks(NamedTuple):
    """Tasks with their documents.

    Attributes:
      loaded: Tasks and groups as lm-eval loads them.
      limit: Most documents of a task; None for all.
      protocol: Of each task its version, number of documents, number of examples in a prompt,
        accuracy of guessing, and SHA-256 of all requests and targets.
    """

    loaded: Mapping[str, Any]
    limit: int | None
    protocol: dict[str, dict[str, Any]]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's log, progress bars and prints; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars_disabled = datasets.are_progress_bars_disabled()
    multiprocessing = os.environ.get("DISABLE_MULTIPROC")
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    # JAX has threads, and a process with threads must not fork.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars_disabled:
            datasets.enable_progress_bars()
        if multiprocessing is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = multiprocessing


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name or os.sep in name


def _files(name: str) -> list[pathlib.Path]:
    """Return the YAML files of a path, which is a file or a directory."""
    path = user_path(name, "tasks")
    if path.is_dir():
        # By lm-eval's custom a leading underscore marks a file that others include.
        files = sorted(
            p
            for p in path.iterdir()
            if p.suffix in (".yaml", ".yml") and not p.name.startswith("_")
        )
        if not files:
            raise InputError(
                "has no .yaml file",
                "name a task, a YAML file or a directory of them",
                field="tasks",
                value=name,
            )
        return files
    if not path.is_file():
        raise InputError("is no such file", "check the path", field="tasks", value=name)
    return [path]


def _resolve_data_files(folder: pathlib.Path, files: Any) -> Any:
    """Make the relative paths of `data_files`, a path or a list or mapping of them, absolute."""
    if isinstance(files, Mapping):
        return {split: _resolve_data_files(folder, part) for split, part in files.items()}
    if isinstance(files, list):
        return [_resolve_data_files(folder, part) for part in files]
    return files if "://" in files else str((folder / pathlib.Path(files).expanduser()).resolve())


def _config(file: pathlib.Path) -> dict[str, Any]:
    """Read a local YAML file and resolve its data files from the file's folder."""
    config = load_yaml(file)
    if isinstance(config.get("task"), list) or "group" in config:
        raise InputError(
            "is a group", "name the YAML files of its tasks", field="tasks", value=file
        )
    if "task" not in config:
        raise InputError(
            "has no `task:`, the name that its results get", "add it", field="tasks", value=file
        )
    kwargs = config.get("dataset_kwargs") or {}
    if "data_files" in kwargs:
        data_files = _resolve_data_files(file.parent, kwargs["data_files"])
        config["dataset_kwargs"] = {**kwargs, "data_files": data_files}
    return config


def _load(name: str, catalogue: TaskManager) -> Mapping[str, Any]:
    """Load what one name or path stands for."""
    try:
        if _is_path(name):
            return catalogue.load([_config(file) for file in _files(name)])
        known = catalogue.match_tasks([name])
        if not known:
            raise InputError(
                "is no such task of lm-eval",
                "`lm-eval ls tasks` lists them; a file is named with .yaml",
                field="tasks",
                value=name,
            )
        return catalogue.load(known)
    except InputError:
        raise
    except Exception as e:
        # YAML, templates, data sets and the network raise exceptions of every kind.
        remedy = "check its data, and the network if they are on the hub"
        if isinstance(e, ModuleNotFoundError):
            # The functions of some tasks, as ifeval's, need packages of their own.
            remedy = "install it, or all that lm-eval's tasks need: pip install 'lm-eval[ifeval]'"
        raise InputError(
            f"cannot be opened ({first_line(e)})",
            remedy,
            field="tasks",
            value=name,
        ) from e


def _check_trust(names: Sequence[str]) -> None:
    """Refuse names of files."""
    # lm-eval runs what `!function` names, and fills its templates by Jinja without a sandbox, from
    # which a template reaches every module. Reading a file without either cannot be told apart.
    file = next(filter(_is_path, names), None)
    if file is not None:
        raise InputError(
            "names task files, and these can run code, in their templates too",
            "read them, then add `trust_task_files`",
            field="tasks",
            value=file,
        )


def open_tasks(
    names: Sequence[str],
    *,
    limit: int = 0,
    num_fewshot: int = -1,
    trust_task_files: bool = False,
) -> Tasks:
    """Open tasks with all their documents, and build every request once.

    Args:
      names: Names of lm-eval's tasks, groups and tags, with wildcards, or paths of YAML files or of
        directories of them. A path has .yaml or a slash in it.
      limit: Most documents of a task, counted from the first; 0 for all.
      num_fewshot: Examples in a prompt; -1 for the task's own number, or none.
      trust_task_files: True to open paths: such files can run any code.

    Returns:
      Tasks, ready to run.

    Raises:
      InputError: lm-eval does not know or cannot open a task, a task needs more than text, or a
        path is not trusted.
    """
    if not trust_task_files:
        _check_trust(names)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    with _quiet():
        catalogue = TaskManager(include_defaults=not all(map(_is_path, names)))
        for name in names:
            new = _load(name, catalogue)
            for part, entries in loaded.items():
                entries |= new.get(part, {})
        protocol = {
            name: _prepare(name, task, limit or None, num_fewshot)
            for name, task in loaded["tasks"].items()
        }
    return Tasks(loaded, limit or None, protocol)


def _prepare(name: str, task: Any, limit: int | None, num_fewshot: int) -> dict[str, Any]:
    """Set how a task is run and return its protocol."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise InputError(
            f"has {name}, which runs code or needs more than text: neither is supported",
            "leave it out",
            field="tasks",
        )
    if task.OUTPUT_TYPE == "generate_until":
        settings = normalize_gen_kwargs(task.config.generation_kwargs or {})
        unknown = settings.keys() - GENERATION_SETTINGS
        if unknown:
            raise InputError(
                f"has {name}, which asks to generate with {', '.join(sorted(unknown))}: that is "
                "not supported",
                "leave it out",
                field="tasks",
            )
    own = task.get_config("num_fewshot")
    # As in lm-eval, a task that sets 0 means it.
    if own is None or (own > 0 and num_fewshot >= 0):
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
    except Exception as e:
        # The task's templates and functions raise exceptions of every kind.
        raise InputError(
            f"has {name}, whose requests cannot be made ({e})",
            "check its YAML against its documents",
            field="tasks",
        ) from e
    # The accuracy of guessing.
    chance = sum(1 / n for n in choices.values()) / len(choices) if choices else None
    return {
        "version": task.VERSION,
        "documents": len({r.doc_id for r in task.instances}),
        "num_fewshot": task.get_config("num_fewshot"),
        "chance": chance,
        "sha256": digest(asked),
    }


def run_tasks(tasks: Tasks, model: HarnessModel) -> dict[str, dict[str, float | None]]:
    """Run tasks on a model.

    Args:
      tasks: Tasks that `open_tasks` opened.
      model: Adapter of the model.

    Returns:
      Metrics of each task and group by lm-eval's names. A metric of a filter is called
      `metric,filter`; `metric_stderr` is its standard error or None.
    """
    for task in tasks.loaded["tasks"].values():
        # Again for every model: the draws go on from one document to the next.
        task.set_fewshot_seed(SEED)
    with _quiet():
        output = lm_eval.evaluate(
            model,
            dict(tasks.loaded),
            limit=tasks.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    return {name: _metrics(results) for name, results in output["results"].items()}


def _metrics(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics of one task or group; lm-eval calls them `metric,filter`."""
    return {
        key.removesuffix(",none"): float(value) if isinstance(value, int | float) else None
        for key, value in results.items()
        if "," in key
    }
