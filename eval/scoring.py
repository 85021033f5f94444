"""Log-likelihoods of continuations: what zero-shot tasks ask of a model."""

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
from models.sharding import place, to_host

POSITIONS = 64  # whose logits are computed together
SHORTEST = 32  # tokens; a shorter text is padded to them

Pair = tuple[
    Sequence[int], Sequence[int]
]  # tokens of a context, one at least, and of what follows it


def bucket(n: int, least: int) -> int:
    """The smallest of 2, 3, 4, 6, 8, 12, … that is at least `n` and `least`: few sizes to compile for, a third of padding at most."""
    power = 1 << (max(n, least, 2) - 1).bit_length()
    return power * 3 // 4 if max(n, least) <= power * 3 // 4 else power


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    head: Callable[[NonBlockParams, jax.Array], jax.Array],
    non_block: NonBlockParams,
    x: jax.Array,
    row: jax.Array,
    column: jax.Array,
    target: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The log-probability float32 [n] of each `target` after the hidden state x[row, column], and whether it is the most likely."""

    def some(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, target = args
        logits = head(non_block, states[None])[0]
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == target

    # The states first: of a whole batch's logits, which are far larger, few are asked for.
    states = x[row, column].reshape(-1, POSITIONS, x.shape[-1])
    log_p, best = jax.lax.map(some, (states, target.reshape(-1, POSITIONS)))
    return log_p.reshape(-1), best.reshape(-1)


def _inputs(pairs: Sequence[Pair], longest: int) -> dict[tuple[int, ...], list[int]]:
    """What the model reads, each text once, with the pairs that it serves: answers of one token to a question share all that is read."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        if len(continuation) > longest:
            raise InputError(
                f"--tasks: a continuation has {len(continuation)} tokens, the model reads {longest}: leave its task out"
            )
        text = (*context, *continuation)[-(longest + 1) : -1]
        found.setdefault(text, []).append(i)
    return found


def log_likelihoods(
    model: Model,
    pairs: Sequence[Pair],
    *,
    longest: int,
    batch: int = 8,
    mesh: Mesh | None = None,
    stage: Callable[[int], Callable[[], None]] = lambda steps: lambda: None,
) -> list[tuple[float, bool]]:
    """(log-probability in nats of the continuation after its context, whether every token of it is the most likely one) of each pair.

    Texts are padded on the right, which under causal attention changes nothing before. They are run from the longest to the shortest,
    whatever their order; the result is in the pairs' order.

    Args:
      longest: tokens that the model reads; of a longer text the first are dropped.
      batch: texts in one micro-batch, which the `data` axis of `mesh` divides.
      stage: told how many micro-batches there are, gives what to call after each.
    Raises InputError for a continuation of more than `longest` tokens.
    """
    served = _inputs(pairs, longest)
    texts = sorted(served, key=lambda text: (-len(text), text))
    groups = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    batches = []
    for group in groups:
        tokens = np.zeros((batch, min(bucket(len(group[0]), SHORTEST), longest)), np.int32)
        for row, text in zip(tokens, group, strict=False):
            row[: len(text)] = text
        batches.append(tokens)
    non_block, found, advance = (
        place(model.non_block, mesh),
        [(0.0, True)] * len(pairs),
        stage(len(batches)),
    )
    for group, (_, x) in zip(groups, last_states(model, non_block, batches, mesh), strict=True):
        asked = [(r, i) for r, text in enumerate(group) for i in served[text]]
        for i, answer in zip(
            [i for _, i in asked], _answers(model, non_block, x, group, asked, pairs), strict=True
        ):
            found[i] = answer
        advance()
    return found


def _answers(
    model: Model,
    non_block: NonBlockParams,
    x: jax.Array,
    group: Sequence[Sequence[int]],
    asked: Sequence[tuple[int, int]],
    pairs: Sequence[Pair],
) -> list[tuple[float, bool]]:
    """The answers of the pairs of one batch, whose last states are x [b t d]; `asked` has (row, pair) of each."""
    places = [
        (r, len(group[r]) - len(pairs[i][1]) + j, token)
        for r, i in asked
        for j, token in enumerate(pairs[i][1])
    ]  # the state before a token predicts it
    padded = np.zeros((bucket(len(places), 2 * POSITIONS), 3), np.int32)
    padded[: len(places)] = np.asarray(places, np.int32).reshape(-1, 3)
    log_p, best = (to_host(a) for a in _scores(model.arch.head, non_block, x, *padded.T))
    bounds = np.cumsum([0, *(len(pairs[i][1]) for _, i in asked)])
    return [
        (float(log_p[a:b].sum(dtype=np.float64)), bool(best[a:b].all()))
        for a, b in itertools.pairwise(bounds)
    ]
