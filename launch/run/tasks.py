"""Open zero-shot tasks of lm-evaluation-harness and run them on models."""

import importlib.metadata
import pathlib
import platform
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.sharding import Mesh

from calibration.digests import file_digest
from calibration.tokenizer import TextTokenizer
from eval.answers import AnswerCache, cache_directory
from launch import __version__
from launch.flags.cli import Flags
from launch.flags.common import LONGEST_DEFAULT, dataset_list
from launch.generate import eos_tokens
from models.checkpoint.companions import tokenizer_config
from models.checkpoint.gguf import gguf_tokenizer_config
from models.checkpoint.reader import Checkpoint, weight_files
from models.errors import InputError
from models.families.fields import longest_text
from models.precision import matmul_setting
from models.processes import is_multiprocess
from models.progress import Progress, no_progress
from models.untrusted import is_count

if TYPE_CHECKING:
    from eval.harness import Vocabulary
    from eval.tasks import Tasks

Results = dict[str, dict[str, Any]]  # {task: {metric: value}}


def task_flags(f: Flags) -> None:
    """Define --tasks, --trust_task_files, --limit, --num_fewshot and --task_cache.

    Args:
      f: The command's flags.
    """
    f.group("Zero-shot tasks")
    f.string(
        "tasks",
        "",
        "comma-separated tasks of lm-eval, such as hellaswag,piqa, or YAML files or directories",
        several=True,
    )
    f.boolean(
        "trust_task_files",
        False,
        "open YAML files of tasks; they can run code, so read them first",
    )
    f.integer("limit", 0, "most documents of a task; 0: all")
    f.integer("num_fewshot", -1, "examples in a prompt; -1: as the task says, or none", -1)
    f.boolean(
        "task_cache",
        True,
        "keep answers in XDG_CACHE_HOME (~/.cache) and reuse those of a model with equal weights",
    )


class ZeroShot(NamedTuple):
    """Zero-shot tasks, ready to run on a model.

    Attributes:
      tasks: The tasks with their documents.
      vocabulary: The model's vocabulary.
    """

    tasks: "Tasks"
    vocabulary: "Vocabulary"

    @property
    def protocol(self) -> dict[str, Any]:
        """Return the report's facts about each task, its requests' SHA-256 among them."""
        harness = f"lm-eval {importlib.metadata.version('lm_eval')}"
        return {name: {"harness": harness, **facts} for name, facts in self.tasks.protocol.items()}


def read_tasks(
    names: str,
    limit: int,
    num_fewshot: int,
    trust_task_files: bool,
    checkpoint: Checkpoint,
    tokenizer: Callable[[], TextTokenizer],
) -> ZeroShot | None:
    """Open zero-shot tasks.

    Args:
      names: Tasks and files, separated by commas.
      limit: Most documents of a task; 0: all.
      num_fewshot: Examples in a prompt; -1: the task's own number.
      trust_task_files: Whether to open YAML files, which can run code.
      checkpoint: The model.
      tokenizer: Returns the model's tokenizer.

    Returns:
      The tasks; None if there are no names.

    Raises:
      InputError: A task cannot be opened, or lm-eval is not installed.
    """
    listed = dataset_list(names)
    if not listed:
        return None
    try:
        from eval.tasks import open_tasks
    except ModuleNotFoundError as e:
        if e.name != "lm_eval":
            raise
        raise InputError(
            "needs lm-evaluation-harness", "pip install lm-eval", field="tasks"
        ) from None
    vocabulary = vocabulary_of(checkpoint, tokenizer())
    tasks = open_tasks(
        listed, limit=limit, num_fewshot=num_fewshot, trust_task_files=trust_task_files
    )
    return ZeroShot(tasks, vocabulary)


def vocabulary_of(checkpoint: Checkpoint, tokenizer: TextTokenizer) -> "Vocabulary":
    """Return the tokenizer with the token that stands before a text without context.

    The token is BOS, or EOS if the tokenizer has no BOS, as in `transformers`.

    Args:
      checkpoint: The model.
      tokenizer: Its tokenizer.

    Raises:
      InputError: Neither the tokenizer's nor the model's configuration names one.
    """
    from eval.harness import Vocabulary

    eos = tuple(eos_tokens(checkpoint))
    config = _tokenizer_config(checkpoint.directory)
    for key in ("bos_token", "eos_token"):
        token = config.get(key)
        # Older files have the text alone, newer ones its properties too.
        text = token.get("content") if isinstance(token, Mapping) else token
        if not isinstance(text, str) or not text:
            continue
        ids = tokenizer.encode(text, False)
        if len(ids) == 1:
            return Vocabulary(tokenizer, ids[0], text, eos)
    bos = checkpoint.config.get("bos_token_id")
    start = next((i for i in (bos, *eos) if is_count(i, 0)), None)
    if start is None:
        raise InputError(
            f"{checkpoint.directory} names no token that begins or ends a text",
            "add bos_token to tokenizer_config.json",
        )
    return Vocabulary(tokenizer, start, "", eos)


def _tokenizer_config(model: pathlib.Path) -> dict[str, Any]:
    """Read the tokenizer's configuration; empty if the checkpoint has none."""
    return gguf_tokenizer_config(model) if model.is_file() else tokenizer_config(model)


def identity(checkpoint: Checkpoint, zero_shot: ZeroShot) -> dict[str, Any]:
    """Collect all that a model's answers depend on besides the requests.

    Args:
      checkpoint: The model.
      zero_shot: The tasks, for the model's vocabulary.

    Returns:
      JSON-able facts by name, the key of the answers' cache.
    """
    directory, dtype = checkpoint.directory, checkpoint.model.non_block.embed.dtype
    files = list(weight_files(directory))
    for pattern in ("*token*", "*.model", "vocab.*", "merges.txt"):
        files += [path for path in sorted(directory.glob(pattern)) if path.is_file()]
    packages = ("jax", "lm_eval", "tokenizers")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        "configuration": checkpoint.config,
        "files": {p.name: file_digest(p) for p in files},
        "start": [zero_shot.vocabulary.start, *zero_shot.vocabulary.eos],
        "dtype": str(dtype),
        "matmul": matmul_setting(),
        "device": [platform.machine(), jax.devices()[0].device_kind],
        "versions": {"topiary": __version__} | versions,
    }


def evaluate_tasks(
    zero_shot: ZeroShot | None,
    checkpoint: Checkpoint,
    batch: int,
    mesh: Mesh | None,
    cache: bool,
    progress: Progress = no_progress,
) -> Results:
    """Run zero-shot tasks on a model.

    Args:
      zero_shot: The tasks; None for none.
      checkpoint: The model.
      batch: Requests at a time.
      mesh: Devices; None: one.
      cache: Whether to reuse answers of a model with equal weights, and to keep new ones.
      progress: Shows the progress.

    Returns:
      {task: {metric: value}}, with the standard error, or None, under "metric_stderr".
    """
    if zero_shot is None:
        return {}
    from eval.harness import HarnessModel
    from eval.tasks import run_tasks

    # Several processes must ask the model the same, so none may know more answers than the others.
    answers = None
    if cache and not is_multiprocess():
        answers = AnswerCache(cache_directory(), identity(checkpoint, zero_shot))
    longest = longest_text(checkpoint.config, LONGEST_DEFAULT)
    model = HarnessModel(
        checkpoint.model,
        zero_shot.vocabulary,
        longest=longest,
        batch=batch,
        mesh=mesh,
        answers=answers,
        progress=progress,
    )
    return run_tasks(zero_shot.tasks, model)
