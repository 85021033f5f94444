"""--tasks: zero-shot tasks of lm-evaluation-harness, opened with a run's other inputs and run on its models."""

import importlib.metadata
import json
import pathlib
import platform
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from calibration.journal import file_digest
from calibration.tokenizer import TextTokenizer
from eval.answers import AnswerCache, cache_directory
from launch import __version__
from launch.flags.cli import Flags
from launch.flags.common import LONGEST_DEFAULT, dataset_list
from launch.generate import eos_tokens
from launch.report import console
from models.checkpoint.gguf import gguf_tokenizer_config
from models.checkpoint.reader import Checkpoint, weight_files
from models.errors import InputError
from models.processes import is_multiprocess

if TYPE_CHECKING:
    from eval.harness import Vocabulary
    from eval.tasks import Tasks

Results = dict[str, dict[str, Any]]  # {task: {metric: value}}


def task_flags(f: Flags) -> None:
    """--tasks, --limit, --num_fewshot, --task_cache."""
    f.group("Zero-shot tasks")
    f.string(
        "tasks",
        "",
        "comma-separated, of lm-eval: names such as hellaswag,piqa, or YAML files or directories of them",
    )
    f.integer("limit", 0, "most documents of a task; 0: all")
    f.integer("num_fewshot", -1, "examples in a prompt; -1: what the task says, or none", -1)
    f.boolean(
        "task_cache",
        True,
        "keep a model's answers in XDG_CACHE_HOME (~/.cache) and use those of the same weights",
    )


class ZeroShot(NamedTuple):
    """What --tasks asks for: the tasks with their documents, and the model's vocabulary."""

    tasks: "Tasks"
    vocabulary: "Vocabulary"

    @property
    def protocol(self) -> dict[str, Any]:
        """What the report says of each task: version, documents, examples in a prompt, SHA-256 of its requests, harness."""
        harness = f"lm-eval {importlib.metadata.version('lm_eval')}"
        return {name: {"harness": harness, **facts} for name, facts in self.tasks.protocol.items()}


def read_tasks(
    names: str,
    limit: int,
    num_fewshot: int,
    checkpoint: Checkpoint,
    tokenizer: Callable[[], TextTokenizer],
) -> ZeroShot | None:
    """Open the tasks of a comma-separated list, None if it is empty; InputError for what cannot be opened, or without lm-eval."""
    listed = dataset_list(names)
    if not listed:
        return None
    try:
        from eval.tasks import open_tasks
    except ModuleNotFoundError as e:
        if e.name != "lm_eval":
            raise
        raise InputError(
            "--tasks needs lm-evaluation-harness: pip install 'topiary[tasks]', or pip install lm-eval"
        ) from None
    vocabulary = vocabulary_of(checkpoint, tokenizer())
    return ZeroShot(open_tasks(listed, limit=limit, num_fewshot=num_fewshot), vocabulary)


def vocabulary_of(checkpoint: Checkpoint, tokenizer: TextTokenizer) -> "Vocabulary":
    """The tokenizer with the token before a text without context: BOS, or EOS where the tokenizer has none, as `transformers` says.

    Raises InputError where neither the tokenizer's nor the model's configuration names one.
    """
    from eval.harness import Vocabulary

    non_block, named = tuple(eos_tokens(checkpoint)), _tokenizer_config(checkpoint.directory)
    for key in ("bos_token", "eos_token"):
        token = named.get(key)
        text = token["content"] if isinstance(token, Mapping) else token
        if text and len(ids := tokenizer.encode(text, False)) == 1:
            return Vocabulary(tokenizer, ids[0], text, non_block)
    bos = checkpoint.config.get("bos_token_id")
    if bos is None and not non_block:
        raise InputError(
            f"{checkpoint.directory} names no token that begins or ends a text: add bos_token to tokenizer_config.json"
        )
    return Vocabulary(tokenizer, non_block[0] if bos is None else int(bos), "", non_block)


def _tokenizer_config(model: pathlib.Path) -> dict[str, Any]:
    """What a checkpoint says of its tokenizer; empty where it says nothing."""
    if model.is_file():
        return gguf_tokenizer_config(model)
    file = model / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def identity(checkpoint: Checkpoint, zero_shot: ZeroShot) -> dict[str, Any]:
    """All that a model's answers depend on beside the requests, JSON-able."""
    directory, dtype = checkpoint.directory, checkpoint.model.non_block.embed.dtype
    patterns = ("*token*", "*.model", "vocab.*", "merges.txt")
    files = [
        *weight_files(directory),
        *(p for pattern in patterns for p in sorted(directory.glob(pattern)) if p.is_file()),
    ]
    packages = ("jax", "lm_eval", "tokenizers")
    return {
        "configuration": checkpoint.config,
        "files": {p.name: file_digest(p) for p in files},
        "start": [zero_shot.vocabulary.start, *zero_shot.vocabulary.eos],
        "dtype": str(dtype),
        "device": [platform.machine(), jax.devices()[0].device_kind],
        "versions": {"topiary": __version__} | {p: importlib.metadata.version(p) for p in packages},
    }


def evaluate_tasks(
    zero_shot: ZeroShot | None, checkpoint: Checkpoint, batch: int, mesh: Mesh | None, cache: bool
) -> Results:
    """{task: {metric: value, metric_stderr: standard error or None}} of a model.

    Args:
      batch: requests in one micro-batch.
      cache: take answers that the same weights gave before, and keep new ones.
    """
    if zero_shot is None:
        return {}
    from eval.harness import HarnessModel
    from eval.tasks import run_tasks

    # Several processes must ask the model the same, so none may know more answers than the others.
    answers = (
        AnswerCache(cache_directory(), identity(checkpoint, zero_shot))
        if cache and not is_multiprocess()
        else None
    )
    longest = int(checkpoint.config.get("max_position_embeddings", LONGEST_DEFAULT))
    with console.progress(
        Console(file=sys.stderr)
    ) as stage:  # the stream of now: what the harness writes to it later is held back
        model = HarnessModel(
            checkpoint.model,
            zero_shot.vocabulary,
            longest=longest,
            batch=batch,
            mesh=mesh,
            answers=answers,
            stage=stage,
        )
        return run_tasks(zero_shot.tasks, model)
