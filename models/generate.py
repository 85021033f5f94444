"""Text from a model: a prompt processed in one piece, then a compiled loop of one token at a time over the cached keys and values.

The whole model is in memory and is an argument of the compiled programs, which are made once for every shape of model and prompts.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Arch, Block, Model, NonBlockParams
from models.cache import Cache, empty

State = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array, tuple[Cache, ...]
]  # count, last token [b], ended [b], text [b new], caches


class Choice(NamedTuple):
    """How the next token is chosen, all traced: `temperature` and `top_p` float [], `key` of the draws."""

    temperature: jax.Array
    top_p: jax.Array
    key: jax.Array


def forward(
    arch: Arch,
    non_block: NonBlockParams,
    blocks: Sequence[Block],
    tokens: jax.Array,
    caches: Sequence[Cache],
    start: int | jax.Array,
    last: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """The logits float32 [b vocab] of tokens int [b t] at the positions from `start`, and the caches with them in.

    The logits are those of each row's token `last` (int [b]); None: of the last column's.
    """
    x, kept = arch.embed(non_block, tokens, start), []
    for block, cache in zip(blocks, caches, strict=True):
        x, cache = arch.step(block, x, cache, start)
        kept.append(cache)
    x = x[:, -1:] if last is None else jnp.take_along_axis(x, last[:, None, None], axis=1)
    return arch.head(non_block, x)[:, 0], tuple(kept)


def _next(
    arch: Arch,
    non_block: NonBlockParams,
    blocks: Sequence[Block],
    token: jax.Array,
    caches: tuple[Cache, ...],
    start: jax.Array,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """`forward` of one token int [b] for each row, at the position `start`: int [], or int [b] where each row has its own."""
    if start.ndim == 0:
        return forward(arch, non_block, blocks, token[:, None], caches, start)

    def row(
        token: jax.Array, caches: tuple[Cache, ...], start: jax.Array
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        alone = jax.tree.map(lambda x: x[None], caches)
        logits, kept = forward(arch, non_block, blocks, token[None, None], alone, start)
        return logits[0], jax.tree.map(lambda x: x[0], kept)

    return jax.vmap(row)(token, caches, start)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(
    arch: Arch,
    non_block: NonBlockParams,
    blocks: tuple[Block, ...],
    prompts: jax.Array,
    capacity: int,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """The logits float32 [b vocab] after prompts int [b t], and each block's cache with room for `capacity` positions.

    Of a row, `lengths` (int [b]; None: all) tokens are the prompt; what stands after them is written over before it is seen.
    """
    caches = [empty(b, arch.config.head_dim, prompts.shape[0], capacity) for b in blocks]
    return forward(
        arch, non_block, blocks, prompts, caches, 0, None if lengths is None else lengths - 1
    )


def nucleus(logits: jax.Array, choice: Choice) -> jax.Array:
    """Logits [b vocab] divided by the temperature, -inf outside the nucleus (Holtzman et al. 2020, section 3.1).

    The nucleus is the fewest most likely tokens, one at least, whose probability together is at least `top_p`, and those that tie with
    its last.
    """
    logits = logits / choice.temperature
    order = -jnp.sort(-logits, axis=-1)
    p = jax.nn.softmax(order, axis=-1)
    inside = jnp.cumsum(p, axis=-1) - p < choice.top_p  # what is more likely does not fill it yet
    inside = inside.at[:, 0].set(True)
    least = jnp.min(jnp.where(inside, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _pick(logits: jax.Array, choice: Choice | None, i: int | jax.Array) -> jax.Array:
    """The i-th new token int32 [b] from logits [b vocab]; the most likely one without a choice."""
    if choice is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(
        jax.random.fold_in(choice.key, i), nucleus(logits, choice)
    ).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=4)
def decode(
    arch: Arch,
    non_block: NonBlockParams,
    blocks: tuple[Block, ...],
    logits: jax.Array,
    caches: tuple[Cache, ...],
    start: jax.Array,
    new_tokens: int,
    choice: Choice | None,
    eos: jax.Array,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """`new_tokens` tokens int32 [b new_tokens], of which the first is taken from the logits [b vocab] and stands at position `start`,
    int [], or int [b] after prompts of different lengths.

    The caches' memory is taken over, and they are returned with the tokens in. The loop ends when every row has given one of `eos`
    (int [e], may be empty); what follows it in a row is `eos[0]`.
    """
    fill = eos[0] if eos.size else jnp.int32(0)

    def ended(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == eos[None, :], axis=1)

    def go_on(state: State) -> jax.Array:
        i, _, done, *_ = state
        return (i < new_tokens) & ~jnp.all(done)

    def one(state: State) -> State:
        i, token, done, out, caches = state
        logits, caches = _next(arch, non_block, blocks, token, caches, start + i - 1)
        token = jnp.where(done, fill, _pick(logits, choice, i))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        return i + 1, token, done | ended(token), out, caches

    token = _pick(logits, choice, 0)
    out = jnp.full((token.shape[0], new_tokens), fill, jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(go_on, one, (jnp.int32(1), token, ended(token), out, caches))[3:]


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
) -> np.ndarray:
    """A continuation int32 [b new_tokens] of each prompt int [b t].

    Args:
      model: read into memory if it is not there.
      temperature: 0 takes the most likely token; above, tokens are drawn with their logits divided by it.
      top_p: tokens are drawn from the nucleus alone, see `nucleus`; 0 < top_p <= 1.
      key: of the draws, needed for a temperature above 0; the same key gives the same text.
      eos: the token, or tokens, that end a text; what follows in a row that has ended is the first of them.
      lengths: int [b], how many tokens of each row are its prompt where they differ: the rest of the row is padding. None: all are.
    Raises ValueError for settings out of range, no new token or an empty prompt, a temperature without a key, or more positions than a
    model with learned ones has.
    """
    prompts = jnp.asarray(prompts, jnp.int32)
    arch, non_block, blocks = model.arch, model.non_block, tuple(model.blocks)
    capacity = prompts.shape[1] + new_tokens
    if temperature < 0 or not 0 < top_p <= 1 or new_tokens < 1 or prompts.shape[1] < 1:
        raise ValueError(
            f"{temperature=}, {top_p=}, {new_tokens=} and prompts of {prompts.shape[1]} tokens: one is out of range"
        )
    if temperature and key is None:
        raise ValueError("a temperature above 0 needs a key to draw with")
    if capacity > getattr(arch.config, "positions", capacity):
        raise ValueError(f"{capacity} tokens, the model has {arch.config.positions} positions")
    choice = (
        Choice(jnp.float32(temperature), jnp.float32(top_p), key)
        if temperature and key is not None
        else None
    )
    ends_at = jnp.asarray([] if eos is None else np.atleast_1d(eos), jnp.int32)
    start = jnp.asarray(prompts.shape[1] if lengths is None else lengths, jnp.int32)
    logits, caches = prefill(
        arch, non_block, blocks, prompts, capacity, None if lengths is None else start
    )
    return np.asarray(
        decode(arch, non_block, blocks, logits, caches, start, new_tokens, choice, ends_at)[0]
    )
