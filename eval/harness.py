"""Adapter of Topiary's models for EleutherAI's lm-evaluation-harness.

It needs the package lm-eval (pip install lm-eval), not torch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.answers import AnswerCache, digest
from eval.scoring import SHORTEST, Score, bucket, log_likelihoods
from models.arch import Model
from models.errors import InputError
from models.generate import generate
from models.progress import Progress, no_progress
from models.sharding import place, split

# Tokens of a generated answer whose task does not say, as with lm-eval's own models.
NEW_TOKENS = 256


class Tokenizer(Protocol):
    """Tokenizer of a model."""

    @property
    def encode(self) -> Callable[[str, bool], list[int]]:
        """Return a function (text, add special tokens) -> tokens."""

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        """Return a function from tokens to text without special tokens."""


class Vocabulary(NamedTuple):
    """Tokenizer with the special tokens that it does not name itself.

    Attributes:
      tokenizer: Tokenizer of the model.
      start: Token that a text without context follows: BOS, or EOS where there is no BOS.
      start_text: Text of that token; empty if it is not known.
      eos: Tokens that end a text.
    """

    tokenizer: Tokenizer
    start: int
    start_text: str
    eos: tuple[int, ...]


class HarnessModel(TemplateLM):
    """Model for `lm_eval.evaluate`.

    The harness hands over all requests at once. The model batches them by length and runs them on
    the mesh.

    Args:
      model: Model to evaluate.
      vocabulary: Tokenizer and special tokens.
      longest: Tokens that the model reads; longer texts lose their beginning.
      batch: Requests in one micro-batch, which the `data` axis of `mesh` divides.
      mesh: Mesh; None for one device.
      answers: Cache of answers; None to keep none.
      progress: Shows the progress.
    """

    def __init__(
        self,
        model: Model,
        vocabulary: Vocabulary,
        *,
        longest: int,
        batch: int = 8,
        mesh: Mesh | None = None,
        answers: AnswerCache | None = None,
        progress: Progress = no_progress,
    ):
        super().__init__()
        self._model = model
        self._vocabulary = vocabulary
        self._longest = longest
        self._batch = batch
        self._mesh = mesh
        self._progress = progress
        self._answers = answers or AnswerCache(None, {})

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return next(iter(self._vocabulary.eos), self._vocabulary.start)

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text without context."""
        return self._vocabulary.start

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenize a text, with special tokens unless it begins with BOS already.

        Args:
          string: Text.
          add_special_tokens: True to add them, False to leave them out; None decides by the text.
          **kwargs: Ignored.

        Returns:
          Token ids.

        Raises:
          InputError: The model does not have one of the tokens.
        """
        if add_special_tokens is None:
            # A chat template may have written BOS already.
            start = self._vocabulary.start_text
            add_special_tokens = not (start and string.startswith(start))
        ids = self._vocabulary.tokenizer.encode(string, add_special_tokens)
        vocab = self._model.arch.config.vocab
        if ids and max(ids) >= vocab:
            raise InputError(
                f"has a text with token {max(ids)}, the model has {vocab}",
                "use this model's own tokenizer",
                field="tasks",
            )
        return ids

    def _cached(
        self,
        kind: str,
        requests: Sequence[Instance],
        compute: Callable[[list[Instance]], Sequence[Any]],
    ) -> list[Any]:
        """Answer requests of one kind, from the cache where it has the whole task."""
        return self._answers.get(
            kind,
            [list(r.args) for r in requests],
            [r.task_name for r in requests],
            lambda indices: compute([requests[i] for i in indices]),
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """Score each (context, continuation).

        Args:
          requests: Requests of lm-eval.
          disable_tqdm: Without effect; `progress` shows progress.

        Returns:
          Log-likelihood in nats, and True if greedy decoding gives the continuation.
        """
        compute = super().loglikelihood
        answers = self._cached(
            "loglikelihood", requests, lambda some: compute(some, disable_tqdm=True)
        )
        # The cache's JSON has lists.
        return [(value, greedy) for value, greedy in answers]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Score]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        return log_likelihoods(
            self._model,
            pairs,
            longest=self._longest,
            batch=self._batch,
            mesh=self._mesh,
            progress=self._progress,
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Compute the log-likelihood of each text as a whole.

        A text is cut into windows of the model's length, so that every token is predicted once.

        Args:
          requests: Requests of lm-eval.
          disable_tqdm: Without effect; `progress` shows progress.

        Returns:
          Log-likelihood of each text in nats.
        """
        return self._cached("loglikelihood_rolling", requests, self._rolling)

    def _rolling(self, requests: list[Instance]) -> list[float]:
        windows = []  # of each request
        for r in requests:
            pairs = get_rolling_token_windows(
                self.tok_encode(r.args[0]), self.prefix_token_id, self._longest, 1
            )
            windows.append([make_disjoint_window(pair) for pair in pairs])
        # All windows in one call, so that they fill batches together.
        scores = iter(self._scores([pair for pairs in windows for pair in pairs]))
        return [sum(next(scores)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generate a text for each (context, settings).

        A text ends at an end token, after `max_gen_toks`, or where one of `until` begins.

        Args:
          requests: Requests of lm-eval.
          disable_tqdm: Without effect; `progress` shows progress.

        Returns:
          Text of each request.
        """
        return self._cached("generate_until", requests, self._texts)

    def _texts(self, requests: list[Instance]) -> list[str]:
        """Generate the texts, requests of equal settings together."""
        arch, non_block, blocks = self._model
        model = Model(
            arch, place(non_block, self._mesh), tuple(place(b, self._mesh) for b in blocks)
        )
        by_settings: dict[str, list[int]] = {}
        for i, r in enumerate(requests):
            by_settings.setdefault(digest(r.args[1]), []).append(i)
        texts = [""] * len(requests)
        for indices in by_settings.values():
            first = requests[indices[0]]
            settings = normalize_gen_kwargs(first.args[1], NEW_TOKENS)
            prompt_room = self._longest - settings["max_gen_toks"]
            if prompt_room < 1:
                raise InputError(
                    f"has {first.task_name}, which asks for {settings['max_gen_toks']} tokens, the "
                    f"model reads {self._longest}",
                    "leave the task out",
                    field="tasks",
                )
            prompts = {i: self._prompt(requests[i].args[0])[-prompt_room:] for i in indices}
            # The longest first: a batch is padded to its longest prompt.
            order = sorted(indices, key=lambda i: (-len(prompts[i]), prompts[i]))
            advance = self._progress("texts", len(order), unit="texts")
            for n in range(0, len(order), self._batch):
                batch = order[n : n + self._batch]
                continuations = self._continue(model, [prompts[i] for i in batch], settings, n)
                for i, text in zip(batch, continuations, strict=True):
                    texts[i] = text
                advance(len(batch))
        return texts

    def _prompt(self, context: str) -> list[int]:
        return self.tok_encode(context) or [self.prefix_token_id]

    def _continue(
        self, model: Model, prompts: list[list[int]], settings: Mapping[str, Any], seed: int
    ) -> list[str]:
        """Continue at most a batch of prompts, the longest first."""
        new = settings["max_gen_toks"]
        # Spare rows repeat the first prompt, so that every batch has one shape.
        rows = prompts + [prompts[0]] * (self._batch - len(prompts))
        length = min(bucket(len(prompts[0]), SHORTEST), self._longest - new)
        tokens = np.zeros((len(rows), length), np.int32)
        for row, prompt in zip(tokens, rows, strict=True):
            row[: len(prompt)] = prompt
        stops = handle_stop_sequences(list(settings["until"]), None)
        out = generate(
            model,
            split(tokens, self._mesh, "sample"),
            new,
            temperature=settings.get("temperature", 0.0) if settings["do_sample"] else 0.0,
            top_p=settings.get("top_p", 1.0),
            key=jax.random.key(seed),
            eos=self._vocabulary.eos or None,
            lengths=np.asarray([len(row) for row in rows]),
            stop=lambda new: all(self._has_ended(row, stops) for row in new),
        )
        return [
            postprocess_generated_text(self._text(row), stops, None) for row in out[: len(prompts)]
        ]

    def _has_ended(self, row: np.ndarray, stops: Sequence[str]) -> bool:
        """Return True if new tokens have an end token, or one of `stops` in their text."""
        if np.isin(row, self._vocabulary.eos).any():
            return True
        text = self._vocabulary.tokenizer.decode(row.tolist())
        return any(stop in text for stop in stops if stop)

    def _text(self, row: np.ndarray) -> str:
        """Decode the tokens before the first end token."""
        ends = np.flatnonzero(np.isin(row, self._vocabulary.eos))
        return self._vocabulary.tokenizer.decode(row[: ends[0] if ends.size else None].tolist())
