"""Log-likelihoods of continuations, which zero-shot tasks ask for."""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eval.forward import last_states
from models.arch import Model, NonBlockParams
from models.errors import InputError
from models.progress import Progress, no_progress
from models.sharding import place, to_host

# Positions whose logits are computed together.
POSITIONS = 64
# Shorter texts are padded to this many tokens.
SHORTEST = 32

# Tokens of a context, at least one, and of the continuation after it.
Pair = tuple[Sequence[int], Sequence[int]]
# (log-probability of the continuation in nats, True if each of its tokens is the most likely).
Score = tuple[float, bool]


def bucket(n: int, least: int) -> int:
    """Round a size up to one of 2, 3, 4, 6, 8, 12, ….

    Few sizes are compiled for, and at most a third of a bucket is padding.

    Args:
      n: Size.
      least: Smallest size to return.

    Returns:
      Smallest bucket that is at least `n` and `least`.
    """
    size = max(n, least, 2)
    power = 1 << (size - 1).bit_length()
    three_quarters = power * 3 // 4
    return three_quarters if max(n, least) <= three_quarters else power


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    head: Callable[[NonBlockParams, jax.Array], jax.Array],
    non_block: NonBlockParams,
    x: jax.Array,
    row: jax.Array,
    column: jax.Array,
    target: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Score target tokens after the hidden states x[row, column].

    Returns:
      Log-probability of each target, float32 [n], and True where it is the most likely token,
      bool [n].
    """

    def score_some(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, target = args
        logits = head(non_block, states[None])[0]
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == target

    # States are selected before the head: the logits of a whole batch are far larger, and only
    # those of the continuations are needed.
    states = x[row, column].reshape(-1, POSITIONS, x.shape[-1])
    log_p, best = jax.lax.map(score_some, (states, target.reshape(-1, POSITIONS)))
    return log_p.reshape(-1), best.reshape(-1)


def _pairs_by_text(pairs: Sequence[Pair], longest: int) -> dict[tuple[int, ...], list[int]]:
    """Return the distinct texts that the model reads, each with the indices of its pairs.

    Answers of one token to a question share all that is read.
    """
    texts: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        if len(continuation) > longest:
            raise InputError(
                f"has a continuation of {len(continuation)} tokens, the model reads {longest}",
                "leave its task out",
                field="tasks",
            )
        # The last token is only predicted, never read.
        text = (*context, *continuation)[-(longest + 1) : -1]
        texts.setdefault(text, []).append(i)
    return texts


def log_likelihoods(
    model: Model,
    pairs: Sequence[Pair],
    *,
    longest: int,
    batch: int = 8,
    mesh: Mesh | None = None,
    progress: Progress = no_progress,
) -> list[Score]:
    """Score each continuation after its context.

    Texts are padded on the right, which under causal attention changes nothing before. They run
    from the longest to the shortest.

    Args:
      model: Model, whose blocks are read as `eval.forward.last_states` does.
      pairs: Context and continuation of each request.
      longest: Tokens that the model reads; a longer text loses its beginning.
      batch: Texts in one micro-batch, which the `data` axis of `mesh` divides.
      mesh: Mesh, texts are split over its `data` axis; None for one device.
      progress: Shows the progress.

    Returns:
      For each pair, in order: the log-probability of the continuation in nats, and True if every
      token of it is the most likely one.

    Raises:
      InputError: A continuation has more than `longest` tokens.
    """
    pairs_of = _pairs_by_text(pairs, longest)
    texts = sorted(pairs_of, key=lambda text: (-len(text), text))
    groups = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    batches = []
    for group in groups:
        tokens = np.zeros((batch, min(bucket(len(group[0]), SHORTEST), longest)), np.int32)
        for row, text in zip(tokens, group, strict=False):
            row[: len(text)] = text
        batches.append(tokens)
    non_block = place(model.non_block, mesh)
    scores = [(0.0, True)] * len(pairs)
    tokens_read = sum(tokens.size for tokens in batches)
    advance = progress("log-likelihoods", tokens_read * len(model.blocks), tokens=tokens_read)
    states = last_states(model, non_block, batches, mesh, advance)
    for group, (_, x) in zip(groups, states, strict=True):
        row_and_pair = [(r, i) for r, text in enumerate(group) for i in pairs_of[text]]
        batch_scores = _batch_scores(model, non_block, x, group, row_and_pair, pairs)
        for (_, i), score in zip(row_and_pair, batch_scores, strict=True):
            scores[i] = score
    return scores


def _batch_scores(
    model: Model,
    non_block: NonBlockParams,
    x: jax.Array,
    group: Sequence[Sequence[int]],
    row_and_pair: Sequence[tuple[int, int]],
    pairs: Sequence[Pair],
) -> list[Score]:
    """Score the pairs of one batch from its last hidden states x [b t d]."""
    # The state before a token predicts it.
    places = [
        (r, len(group[r]) - len(pairs[i][1]) + j, token)
        for r, i in row_and_pair
        for j, token in enumerate(pairs[i][1])
    ]
    padded = np.zeros((bucket(len(places), 2 * POSITIONS), 3), np.int32)
    padded[: len(places)] = np.asarray(places, np.int32).reshape(-1, 3)
    row, column, target = padded.T
    log_p, best = (to_host(a) for a in _scores(model.arch.head, non_block, x, row, column, target))
    bounds = np.cumsum([0, *(len(pairs[i][1]) for _, i in row_and_pair)])
    # Sums in float64: hundreds of float32 terms would lose digits.
    return [
        (float(log_p[a:b].sum(dtype=np.float64)), bool(best[a:b].all()))
        for a, b in itertools.pairwise(bounds)
    ]
