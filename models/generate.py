"""Text generation: prefill of whole prompts, then a compiled loop over single tokens.

The whole model is in memory and is an argument of the compiled programs, so one compilation serves
every model and prompt of the same shapes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Arch, Block, Model, NonBlockParams
from models.cache import Cache, empty_cache
from models.sampling import Sampling, select_token

# New tokens after which a caller is asked whether the texts are long enough.
PART = 32


class _State(NamedTuple):
    """State of the decoding loop: number of new tokens, last tokens, ended rows, text, caches."""

    length: jax.Array  # int []
    token: jax.Array  # int32 [b]
    ended: jax.Array  # bool [b]
    text: jax.Array  # int32 [b new_tokens]
    caches: tuple[Cache, ...]


def forward(
    arch: Arch,
    non_block: NonBlockParams,
    blocks: Sequence[Block],
    tokens: jax.Array,
    caches: Sequence[Cache],
    start: int | jax.Array,
    last: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Run the model on new tokens of texts whose earlier tokens are in the caches.

    Args:
      arch: Architecture.
      non_block: Parameters outside the blocks.
      blocks: Parameters of each block.
      tokens: New token ids, int [b t].
      caches: Cache of each block.
      start: Position of the first new token.
      last: Column of each row whose logits are wanted, int [b]; None for the last column.

    Returns:
      Logits, float32 [b vocab], and the caches with the new tokens in them.
    """
    x, written = arch.embed(non_block, tokens, start), []
    for block, cache in zip(blocks, caches, strict=True):
        x, cache = arch.step(block, x, cache, start)
        written.append(cache)
    # One column before the head: the logits of all would be the largest array.
    x = x[:, -1:] if last is None else jnp.take_along_axis(x, last[:, None, None], axis=1)
    return arch.head(non_block, x)[:, 0], tuple(written)


def _next_logits(
    arch: Arch,
    non_block: NonBlockParams,
    blocks: Sequence[Block],
    token: jax.Array,
    caches: tuple[Cache, ...],
    start: jax.Array,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Run `forward` on one token int [b] a row, at the position `start`, int [] or int [b]."""
    if start.ndim == 0:
        return forward(arch, non_block, blocks, token[:, None], caches, start)

    # Rows have positions of their own: each is a batch of one under vmap.
    def run_row(
        token: jax.Array, caches: tuple[Cache, ...], start: jax.Array
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        batched = jax.tree.map(lambda x: x[None], caches)
        logits, written = forward(arch, non_block, blocks, token[None, None], batched, start)
        return logits[0], jax.tree.map(lambda x: x[0], written)

    return jax.vmap(run_row)(token, caches, start)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(
    arch: Arch,
    non_block: NonBlockParams,
    blocks: tuple[Block, ...],
    prompts: jax.Array,
    capacity: int,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Run the model on whole prompts.

    Args:
      arch: Architecture, static.
      non_block: Parameters outside the blocks.
      blocks: Parameters of each block.
      prompts: Token ids, int [b t].
      capacity: Number of positions of each cache, static.
      lengths: Number of tokens of each prompt, int [b]; None for t. Padding after a prompt is
        overwritten before any token sees it.

    Returns:
      Logits after each prompt, float32 [b vocab], and the cache of each block.
    """
    caches = [empty_cache(b.k, arch.config.head_dim, prompts.shape[0], capacity) for b in blocks]
    last = None if lengths is None else lengths - 1
    return forward(arch, non_block, blocks, prompts, caches, 0, last)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=4)
def decode(
    arch: Arch,
    non_block: NonBlockParams,
    blocks: tuple[Block, ...],
    logits: jax.Array,
    caches: tuple[Cache, ...],
    start: jax.Array,
    new_tokens: int,
    sampling: Sampling | None,
    eos: jax.Array,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Generate tokens after prefilled prompts.

    The loop ends early when every row has produced one of `eos`.

    Args:
      arch: Architecture, static.
      non_block: Parameters outside the blocks.
      blocks: Parameters of each block.
      logits: Logits of the first new token, [b vocab].
      caches: Cache of each block; their memory is donated.
      start: Position of the first new token, int [], or int [b] after prompts of different lengths.
      new_tokens: Number of tokens to generate, static.
      sampling: Settings of random sampling; None takes the most likely token.
      eos: Tokens that end a text, int [e], may be empty.

    Returns:
      Token ids, int32 [b new_tokens], in a row filled with `eos[0]` after its end, and the caches
      with the new tokens in them.
    """
    fill = eos[0] if eos.size else jnp.int32(0)

    def ends_text(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == eos[None, :], axis=1)

    def unfinished(state: _State) -> jax.Array:
        return (state.length < new_tokens) & ~jnp.all(state.ended)

    def append_token(state: _State) -> _State:
        i = state.length
        logits, caches = _next_logits(
            arch, non_block, blocks, state.token, state.caches, start + i - 1
        )
        # Rows that have ended still run, because shapes are static; their tokens are replaced.
        token = jnp.where(state.ended, fill, select_token(logits, sampling, i))
        text = jax.lax.dynamic_update_slice(state.text, token[:, None], (0, i))
        return _State(i + 1, token, state.ended | ends_text(token), text, caches)

    token = select_token(logits, sampling, 0)
    text = jnp.full((token.shape[0], new_tokens), fill, jnp.int32).at[:, 0].set(token)
    state = _State(jnp.int32(1), token, ends_text(token), text, caches)
    state = jax.lax.while_loop(unfinished, append_token, state)
    return state.text, state.caches


# A program of its own, between two calls of `decode`.
_feed = jax.jit(_next_logits, static_argnums=0, donate_argnums=4)


def _decode_parts(
    model: Model,
    logits: jax.Array,
    caches: tuple[Cache, ...],
    start: jax.Array,
    new_tokens: int,
    eos: jax.Array,
    stop: Callable[[np.ndarray], bool],
) -> np.ndarray:
    """Generate greedily in parts until `stop` says that the texts are long enough."""
    arch, non_block, blocks = model
    text = np.zeros((logits.shape[0], 0), np.int32)
    while True:
        part = min(PART, new_tokens - text.shape[1])
        more, caches = decode(arch, non_block, blocks, logits, caches, start, part, None, eos)
        text = np.concatenate([text, np.asarray(more)], axis=1)
        if text.shape[1] == new_tokens or stop(text):
            return text
        start = start + part
        # The last new token of a part has not been read yet.
        logits, caches = _feed(arch, non_block, blocks, more[:, -1], caches, start - 1)


def _generate_across(
    restart: int,
    model: Model,
    prompts: jax.Array,
    new_tokens: int,
    sampling: Sampling | None,
    eos: jax.Array,
    lengths: np.ndarray | None,
) -> np.ndarray:
    """Continue prompts across the length at which all keys are computed anew, int32 [b new]."""
    lengths = np.full(prompts.shape[0], prompts.shape[1]) if lengths is None else lengths
    rows = []
    # Each row alone, as prompts of different lengths get there at different tokens.
    for r, length in enumerate(lengths):
        text, made = prompts[r : r + 1, : int(length)], 0
        while made < new_tokens:
            # The last new token is not fed, so a part may end one beyond the length.
            room = restart + 1 - text.shape[1]
            part = min(room, new_tokens - made) if room > 0 else new_tokens - made
            logits, caches = prefill(*model, text, text.shape[1] + part)
            own = sampling
            if sampling is not None:
                # A key for each row and part.
                key = jax.random.fold_in(jax.random.fold_in(sampling.key, r), made)
                own = sampling._replace(key=key)
            start = jnp.int32(text.shape[1])
            more, _ = decode(*model, logits, caches, start, part, own, eos)
            text, made = jnp.concatenate([text, more], axis=1), made + part
            if jnp.isin(more, eos).any():
                # The text has ended; what follows is not looked at.
                fill = jnp.full((1, new_tokens - made), eos[0], jnp.int32)
                text, made = jnp.concatenate([text, fill], axis=1), new_tokens
        rows.append(np.asarray(text[0, int(length) :]))
    return np.stack(rows)


def generate(
    model: Model,
    prompts: np.ndarray | jax.Array,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos: int | Sequence[int] | None = None,
    lengths: np.ndarray | None = None,
    stop: Callable[[np.ndarray], bool] | None = None,
) -> np.ndarray:
    """Continue prompts.

    Args:
      model: Model, read into memory if it is not there.
      prompts: Token ids, int [b t].
      new_tokens: Number of tokens to generate.
      temperature: 0 takes the most likely token; above 0, tokens are drawn with their logits
        divided by it.
      top_p: Probability of the nucleus that tokens are drawn from, 0 < top_p <= 1.
      key: Key of the draws, needed for a temperature above 0. One key gives one text.
      eos: Token or tokens that end a text. The rest of a row that has ended is the first of them.
      lengths: Number of tokens of each prompt, int [b], where the rest of its row is padding; None
        for t.
      stop: Asked after every PART new tokens of a greedy text, with all new tokens so far, int32
        [b n]; True ends the generation there. What follows a token that ends a row's text is then
        undefined.

    Returns:
      Continuations, int32 [b new_tokens]; fewer tokens if `stop` ended them.

    Raises:
      ValueError: A setting is out of range, there is no new token, a prompt is empty, a temperature
        has no key, or the model has fewer learned positions than needed.
    """
    prompts = jnp.asarray(prompts, jnp.int32)
    model = model._replace(blocks=tuple(model.blocks))
    arch, non_block, blocks = model
    # Room for the whole text from the start: a cache that grew would compile at every length.
    capacity = prompts.shape[1] + new_tokens
    if temperature < 0 or not 0 < top_p <= 1 or new_tokens < 1 or prompts.shape[1] < 1:
        raise ValueError(
            f"{temperature=}, {top_p=}, {new_tokens=} and prompts of {prompts.shape[1]} tokens: "
            "one is out of range"
        )
    if temperature and key is None:
        raise ValueError("a temperature above 0 needs a key to draw with")
    if capacity > getattr(arch.config, "positions", capacity):
        raise ValueError(f"{capacity} tokens, the model has {arch.config.positions} positions")
    sampling = None
    if temperature and key is not None:
        # The whole vocabulary needs no sorting, which takes as long as a small model's step.
        p = None if top_p == 1 else jnp.float32(top_p)
        sampling = Sampling(jnp.float32(temperature), p, key)
    eos_ids = jnp.asarray([] if eos is None else np.atleast_1d(eos), jnp.int32)
    restart = getattr(arch.config, "restart", None)
    if restart is not None and restart < capacity - 1:
        return _generate_across(restart, model, prompts, new_tokens, sampling, eos_ids, lengths)
    start = jnp.asarray(prompts.shape[1] if lengths is None else lengths, jnp.int32)
    logits, caches = prefill(
        arch, non_block, blocks, prompts, capacity, None if lengths is None else start
    )
    if stop is not None and sampling is None:
        return _decode_parts(model, logits, caches, start, new_tokens, eos_ids, stop)
    text, _ = decode(arch, non_block, blocks, logits, caches, start, new_tokens, sampling, eos_ids)
    return np.asarray(text)
