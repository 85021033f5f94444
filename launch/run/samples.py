"""Generate text with the dense and the pruned model, for the report.

Figures do not show a model that repeats itself; a text does. Texts that continue the beginnings of
evaluation windows are not shown: the tokens until they part from the dense model's are counted.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from calibration.data import Tokens
from calibration.states import fits_in_memory
from calibration.tokenizer import TextTokenizer, has_tokenizer
from eval.agreement import equal_starts, estimate
from launch.generate import continuation, eos_tokens, prompt_tokens
from models.checkpoint.reader import Checkpoint
from models.checkpoint.widths import with_few_widths
from models.generate import generate
from models.progress import Progress, no_progress

PROMPTS = (
    "Once there was a kind girl named Lucy, who lived near the sea. One day",
    "The three largest cities of Europe are London,",
)
NEW_TOKENS = 32
# Windows of a data set whose beginnings are continued, and tokens of each.
WINDOWS = 16
BEGINNING = 32


class Samples(NamedTuple):
    """Texts of both models, and how long they are equal.

    Attributes:
      texts: {"prompt", "dense", "pruned"} for each prompt, and "recovered" where there is one.
      greedy: By data set: "greedy", the mean number of tokens before the pruned model's greedy
        continuation first differs from the dense model's; its standard error over prompts as
        "greedy_stderr"; "greedy_most", the tokens of a continuation; "greedy_prompts", their
        number. Where there is a recovered model, the same of it as "recovered".
    """

    texts: list[dict[str, str]]
    greedy: dict[str, dict[str, Any]]


def samples(
    dense: Checkpoint,
    pruned: Checkpoint,
    tokenizer: Callable[[], TextTokenizer],
    data: Mapping[str, Tokens],
    progress: Progress = no_progress,
    recovered: Checkpoint | None = None,
) -> Samples:
    """Continue the prompts and the beginnings of evaluation windows greedily with all models.

    One batch holds all of them, so that each model generates once.

    Args:
      dense: The dense model.
      pruned: The pruned model.
      tokenizer: Returns the model's tokenizer.
      data: Evaluation windows by data set.
      progress: Shows the progress.
      recovered: The recovered model; None for none.

    Returns:
      The samples. Without texts if the model has no tokenizer; empty if it is too large to be held
      whole, or has too few positions.

    Raises:
      InputError: The tokenizer or the generation settings do not fit the model.
    """
    itemsize = dense.model.non_block.embed.dtype.itemsize
    shown = _prompts(dense, tokenizer)
    beginnings = {name: _beginnings(tokens.ids) for name, tokens in data.items()}
    rows = [*shown, *(row for part in beginnings.values() for row in part)]
    longest = max(map(len, rows), default=0)
    positions = getattr(dense.model.arch.config, "positions", longest + NEW_TOKENS)
    if not rows or positions < longest + NEW_TOKENS:
        return Samples([], {})
    if not fits_in_memory(dense.parameters * itemsize):
        return Samples([], {})
    models = {"dense": dense, "pruned": pruned}
    if recovered is not None:
        models["recovered"] = recovered
    advance = progress("generating samples", len(models), unit="models")
    new = {}
    for name, checkpoint in models.items():
        new[name] = _continue(checkpoint, rows, longest)
        advance()
    texts = _texts(tokenizer, shown, new, eos_tokens(dense)) if shown else []
    behind = {name: ids[len(shown) :] for name, ids in new.items()}
    greedy = _greedy(beginnings, behind["dense"], behind["pruned"])
    if recovered is not None:
        of_recovered = _greedy(beginnings, behind["dense"], behind["recovered"])
        greedy = {name: f | {"recovered": of_recovered[name]} for name, f in greedy.items()}
    return Samples(texts, greedy)


def with_greedy(
    agreement: Mapping[str, Mapping[str, Any]], greedy: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the report's `agreement` with the greedy tokens of each model.

    Args:
      agreement: By data set; that of a recovered model is in "recovered".
      greedy: As `Samples` has it.
    """
    merged = {}
    for name, found in agreement.items():
        own = greedy.get(name, {})
        merged[name] = {**found, **own}
        if "recovered" in found:
            merged[name]["recovered"] = {**found["recovered"], **own.get("recovered", {})}
    return merged


def _prompts(dense: Checkpoint, tokenizer: Callable[[], TextTokenizer]) -> list[list[int]]:
    """Return the tokens of the prompts; none without a tokenizer."""
    if not has_tokenizer(dense.directory):
        return []
    encoded = [prompt_tokens(tokenizer(), prompt, dense) for prompt in PROMPTS]
    # One length for all, as a cut text shows what a model makes of its middle.
    return [ids[: min(map(len, encoded))] for ids in encoded]


def _beginnings(windows: np.ndarray) -> list[list[int]]:
    """Return the first tokens of windows that are spread evenly over a data set."""
    count = min(WINDOWS, len(windows))
    # Windows next to each other may be of one document.
    return [windows[k * len(windows) // count, :BEGINNING].tolist() for k in range(count)]


def _continue(checkpoint: Checkpoint, rows: list[list[int]], longest: int) -> np.ndarray:
    """Continue prompts greedily, beyond a token that ends a text, int32 [prompts NEW_TOKENS]."""
    prompts = np.zeros((len(rows), longest), np.int32)
    for prompt, row in zip(prompts, rows, strict=True):
        prompt[: len(row)] = row
    lengths = np.asarray([len(row) for row in rows])
    return generate(with_few_widths(checkpoint.model), prompts, NEW_TOKENS, lengths=lengths)


def _texts(
    tokenizer: Callable[[], TextTokenizer],
    prompts: list[list[int]],
    new: Mapping[str, np.ndarray],
    eos: list[int],
) -> list[dict[str, str]]:
    """Return the prompts with the continuations of all models as text."""
    return [
        {"prompt": tokenizer().decode(ids)}
        | {name: continuation(tokenizer(), ids, rows[i], eos) for name, rows in new.items()}
        for i, ids in enumerate(prompts)
    ]


def _greedy(
    beginnings: Mapping[str, list[list[int]]], dense: np.ndarray, pruned: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return `Samples.greedy` from the continuations of all beginnings in order."""
    result, start = {}, 0
    counts = equal_starts(dense, pruned)
    for name, rows in beginnings.items():
        mean = estimate(counts[start : start + len(rows)])
        result[name] = {
            "greedy": mean.value,
            "greedy_stderr": mean.error,
            "greedy_most": NEW_TOKENS,
            "greedy_prompts": len(rows),
        }
        start += len(rows)
    return result
