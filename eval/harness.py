"""Topiary's models as EleutherAI's lm-evaluation-harness sees them (pip install lm-eval; torch is not needed)."""

import functools
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

from eval.answers import Answers, digest
from eval.scoring import SHORTEST, bucket, log_likelihoods
from models.arch import Model
from models.errors import InputError
from models.generate import generate
from models.sharding import place, split

NEW_TOKENS = 256  # of a generated answer whose task does not say, as with lm-eval's own models
Stage = Callable[[str, int], Callable[[], None]]


class Tokenizer(Protocol):
    """A model's tokenizer."""

    @property
    def encode(self) -> Callable[[str, bool], list[int]]:
        """Text to tokens; if so asked, with what the tokenizer puts around every text."""

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        """Tokens to text, special tokens left out."""


class Vocabulary(NamedTuple):
    """A tokenizer, and what it does not say itself.

    `start` is the token that a text without context follows (BOS, or EOS where there is none), `start_text` its text (empty if that is
    not known), and `non_block` are the tokens that end a text.
    """

    tokenizer: Tokenizer
    start: int
    start_text: str
    non_block: tuple[int, ...]


class HarnessModel(TemplateLM):
    """A model for `lm_eval.evaluate`, which hands it all requests at once: it batches by length and uses the mesh by itself.

    Args:
      longest: tokens that the model reads: longer texts lose their beginning.
      batch: requests in one micro-batch, which the `data` axis of `mesh` divides.
      answers: where answers are kept.
      stage: shows progress.
    """

    def __init__(
        self,
        model: Model,
        vocabulary: Vocabulary,
        *,
        longest: int,
        batch: int = 8,
        mesh: Mesh | None = None,
        answers: Answers | None = None,
        stage: Stage = lambda description, steps: lambda: None,
    ):
        super().__init__()
        self._model, self._vocabulary, self._longest = model, vocabulary, longest
        self._batch, self._mesh, self._stage = batch, mesh, stage
        self._answers = answers or Answers(None, {})

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return next(iter(self._vocabulary.non_block), self._vocabulary.start)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        return self._vocabulary.start

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, with what the tokenizer puts around it unless it begins with BOS already.

        Raises InputError for tokens that the model does not have.
        """
        if add_special_tokens is None:
            start = self._vocabulary.start_text
            add_special_tokens = not (start and string.startswith(start))
        ids, vocab = (
            self._vocabulary.tokenizer.encode(string, add_special_tokens),
            self._model.arch.config.vocab,
        )
        if ids and max(ids) >= vocab:
            raise InputError(
                f"--tasks: a text has token {max(ids)}, the model has {vocab}: use this model's own tokenizer"
            )
        return ids

    def _kept(
        self,
        kind: str,
        requests: Sequence[Instance],
        compute: Callable[[list[Instance]], Sequence[Any]],
    ) -> list[Any]:
        """The answers to requests of one kind, a task's from the cache where it has them."""
        args = [list(r.args) for r in requests]
        return self._answers.of(
            kind,
            args,
            [r.task_name for r in requests],
            lambda own: compute([requests[i] for i in own]),
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would say it) of each (context, continuation)."""
        compute = super().loglikelihood
        found = self._kept("loglikelihood", requests, lambda own: compute(own, disable_tqdm=True))
        return [(value, greedy) for value, greedy in found]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        stage = functools.partial(self._stage, "log-likelihoods")
        return log_likelihoods(
            self._model,
            pairs,
            longest=self._longest,
            batch=self._batch,
            mesh=self._mesh,
            stage=stage,
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """The log-likelihood of each text as a whole: windows of the model's length, of which every token is predicted once."""
        return self._kept("loglikelihood_rolling", requests, self._rolling)

    def _rolling(self, requests: list[Instance]) -> list[float]:
        windows = [
            [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    self.tok_encode(r.args[0]), self.prefix_token_id, self._longest, 1
                )
            ]
            for r in requests
        ]
        scores = iter(self._scores([pair for own in windows for pair in own]))
        return [sum(next(scores)[0] for _ in own) for own in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """A text for each (context, settings): to the model's end token or `max_gen_toks`, cut where one of `until` begins."""
        return self._kept("generate_until", requests, self._texts)

    def _texts(self, requests: list[Instance]) -> list[str]:
        arch, non_block, blocks = self._model
        model = Model(
            arch, place(non_block, self._mesh), tuple(place(b, self._mesh) for b in blocks)
        )
        kinds: dict[str, list[int]] = {}
        for i, r in enumerate(requests):
            kinds.setdefault(digest(r.args[1]), []).append(i)
        texts = [""] * len(requests)
        for own in kinds.values():
            settings = normalize_gen_kwargs(requests[own[0]].args[1], NEW_TOKENS)
            room = self._longest - settings["max_gen_toks"]
            if room < 1:
                raise InputError(
                    f"--tasks: {requests[own[0]].task_name} asks for {settings['max_gen_toks']} tokens, "
                    f"the model reads {self._longest}: leave the task out"
                )
            prompts = {i: self._prompt(requests[i].args[0])[-room:] for i in own}
            order = sorted(own, key=lambda i: (-len(prompts[i]), prompts[i]))
            advance = self._stage("texts", len(order))
            for n in range(0, len(order), self._batch):
                some = order[n : n + self._batch]
                for i, text in zip(
                    some,
                    self._continued(model, [prompts[i] for i in some], settings, n),
                    strict=True,
                ):
                    texts[i] = text
                    advance()
        return texts

    def _prompt(self, context: str) -> list[int]:
        return self.tok_encode(context) or [self.prefix_token_id]

    def _continued(
        self, model: Model, prompts: list[list[int]], settings: Mapping[str, Any], seed: int
    ) -> list[str]:
        """What follows each of at most a batch of prompts; rows that are left over repeat the first."""
        new = settings["max_gen_toks"]
        rows = prompts + [prompts[0]] * (self._batch - len(prompts))
        tokens = np.zeros(
            (len(rows), min(bucket(len(prompts[0]), SHORTEST), self._longest - new)), np.int32
        )
        for row, prompt in zip(tokens, rows, strict=True):
            row[: len(prompt)] = prompt
        out = generate(
            model,
            split(tokens, self._mesh, "sample"),
            new,
            temperature=settings.get("temperature", 0.0) if settings["do_sample"] else 0.0,
            top_p=settings.get("top_p", 1.0),
            key=jax.random.key(seed),
            eos=self._vocabulary.non_block or None,
            lengths=np.asarray([len(row) for row in rows]),
        )
        stops = handle_stop_sequences(list(settings["until"]), None)
        return [
            postprocess_generated_text(self._text(row), stops, None) for row in out[: len(prompts)]
        ]

    def _text(self, row: np.ndarray) -> str:
        ended = np.flatnonzero(np.isin(row, self._vocabulary.non_block))
        return self._vocabulary.tokenizer.decode(row[: ended[0] if ended.size else None].tolist())
