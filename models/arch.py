"""What an architecture declares of itself, once, so that no pruning method has to know its name.

A model is `Model(arch, ends, blocks)`: `non_block` holds the parameters outside the blocks (embeddings, last norm, head), `blocks` is a
sequence of one pytree per decoder block, either a tuple in memory or a lazy view of a checkpoint (`models.checkpoint.reader`). Widths live in the
arrays alone, so a block whose heads or neurons were cut needs no new configuration.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.cache import Cache, Start
from models.programs import program

Block = Any  # flax.struct dataclass: models.families.llama.Block or models.families.opt.Block
NonBlockParams = (
    Any  # flax.struct dataclass: models.families.llama.Ends or models.families.opt.Ends
)
Taps = Mapping[
    str, jax.Array
]  # activations of one block call, each [b t c]; jit drops those that nobody reads


class Slot(NamedTuple):
    """One prunable linear of a block.

    `name` is the field of the block that holds it; a block's taps hold its output under the same name. `reads` is the tap it consumes:
    linears that read one tap share its statistics. `feeds` is the tap its output reaches, or "next" for the residual stream.
    """

    name: str
    reads: str
    feeds: str


class Member(NamedTuple):
    """A slice of a coupled group: `width` consecutive entries a unit along `axis` of linear `name` (axis 0 outputs, 1 inputs)."""

    name: str
    axis: int
    width: int


class Group(NamedTuple):
    """Channels that live and die together: the `reader`'s input columns with the `writers`' output rows.

    The last writer is the linear path into the channel; those before it gate it (SwiGLU's gate) or pair with it (q, k of attention).
    """

    name: str
    reader: Member
    writers: tuple[Member, ...]


class Arch(NamedTuple):
    """A family's pure functions with its configuration bound. Made by a cached factory, so equal configurations give one object;
    hashable, for use as a static argument of jit. Its functions are the same objects wherever they compute the same, so a program that
    is compiled for one of them serves the dense and the pruned model.

    Attributes:
      embed: (ends, tokens int [b t], start=0) -> x [b t d]; `start` is the first token's position, an int or traced.
      block: (block, x [b t d]) -> (x [b t d], taps).
      head: (ends, x [b t d]) -> logits float32 [b t vocab].
      step: (block, x [b t d], cache, start) -> (x [b t d], cache): `block` for the next t positions of a text whose earlier keys and
          values the cache holds. With `start` the int 0 it holds none, and the work is that of `block`.
      residual: a block's output is its last linear's output added to the residual stream, with no norm after it.
    """

    config: Any
    embed: Callable[..., jax.Array]
    block: Callable[[Block, jax.Array], tuple[jax.Array, Taps]]
    head: Callable[[NonBlockParams, jax.Array], jax.Array]
    step: Callable[[Block, jax.Array, Cache, Start], tuple[jax.Array, Cache]]
    slots: tuple[Slot, ...]
    groups: tuple[Group, ...]
    residual: bool = True

    def tap(self, slot: str) -> str:
        """The tap that the slot of this name reads; KeyError if the architecture has none."""
        return {s.name: s.reads for s in self.slots}[slot]

    def group(self, name: str) -> Group:
        """The coupled group called `name`; KeyError if the architecture has none."""
        return {g.name: g for g in self.groups}[name]


class Model(NamedTuple):
    """An architecture with its parameters: what methods read. `blocks` is a tuple, or a lazy sequence of a checkpoint's blocks."""

    arch: Arch
    non_block: NonBlockParams
    blocks: Sequence[Block]


def logits(model: Model, tokens: jax.Array) -> jax.Array:
    """The model's float32 logits [b t vocab] for tokens int [b t]."""
    x = model.arch.embed(model.non_block, tokens)
    for block in model.blocks:
        x, _ = model.arch.block(block, x)
    return model.arch.head(model.non_block, x)


@program("embedding", static=(0,))
def _embed(
    function: Callable[..., jax.Array], non_block: NonBlockParams, tokens: jax.Array
) -> jax.Array:
    return function(non_block, tokens)


def embed(arch: Arch, non_block: NonBlockParams, tokens: jax.Array) -> jax.Array:
    """`arch.embed`, compiled once for all ends of equal shapes."""
    return _embed(arch.embed, non_block, tokens)


@program("block", static=(0,))
def _apply(
    function: Callable[..., tuple[jax.Array, Taps]], block: Block, x: jax.Array
) -> jax.Array:
    return function(block, x)[0]


def apply_block(arch: Arch, block: Block, x: jax.Array, name: str = "") -> jax.Array:
    """`arch.block` without its taps, compiled once for all blocks of equal shapes."""
    return _apply(arch.block, block, x, name=name)


def cross_entropy(
    arch: Arch, non_block: NonBlockParams, x: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Mean cross-entropy of each window [b] in nats, float32, over its length-1 predicted positions.

    Args:
      x: what leaves the last block [b t d]; tokens: int [b t].
    """
    return _cross_entropy(arch.head, non_block, x, tokens)


@program("cross-entropy", static=(0,))
def _cross_entropy(
    head: Callable[[NonBlockParams, jax.Array], jax.Array],
    non_block: NonBlockParams,
    x: jax.Array,
    tokens: jax.Array,
) -> jax.Array:
    def window(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, t = args
        logits = head(non_block, x[None, :-1])[0]
        chosen = jnp.take_along_axis(logits, t[1:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    # One window at a time: the logits of one are already as large as a block's weights.
    return jax.lax.map(window, (x, tokens))
