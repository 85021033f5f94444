"""Architectures as values, so that no pruning method has to know a family's name.

A model is `Model(arch, non_block, blocks)`. `non_block` holds the parameters outside the blocks:
embeddings, final norm, head. `blocks` has one pytree per decoder block. It is a tuple in memory or
a lazy view of a checkpoint (`models.checkpoint.reader`). Widths live in the arrays alone, so a
block that lost heads or neurons needs no new configuration.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from models.cache import Cache, Start
from models.experts import split_name
from models.layers import Linear
from models.programs import program

# Activations of one block call by name, each [b t c]. jit drops those that nobody reads.
Taps = Mapping[str, jax.Array]


class Block(Protocol):
    """Parameters of one decoder block: a pytree with a Linear under the name of every slot."""

    @property
    def k(self) -> Linear:
        """Return the key projection, whose output rows say how many key-value heads there are."""

    def replace(self, **fields: Any) -> Self:
        """Return a copy with other values of the given fields."""


class NonBlockParams(Protocol):
    """Parameters outside the blocks: embeddings, final norm, head."""

    @property
    def embed(self) -> Any:
        """Return the token embedding, [vocab d]."""

    @property
    def head(self) -> Linear | None:
        """Return the output head; None where the embedding serves as the head."""

    def replace(self, **fields: Any) -> Self:
        """Return a copy with other values of the given fields."""


class Slot(NamedTuple):
    """One prunable linear of a block.

    Attributes:
      name: Field of the block that holds the linear. The block's taps hold its output under this
        name.
      reads: Tap that the linear consumes. Linears that read one tap share its statistics.
      feeds: Tap that the output reaches, or "next" for the residual stream.
      part_of: Tap of all tokens, of which an expert's `reads` has some; empty if it has all.
    """

    name: str
    reads: str
    feeds: str
    part_of: str = ""


class Member(NamedTuple):
    """Slice of a coupled group within one linear.

    Attributes:
      name: Slot of the linear.
      axis: Axis of its matrix, 0 for outputs and 1 for inputs.
      width: Number of consecutive entries along `axis` that belong to one unit.
    """

    name: str
    axis: int
    width: int


class Group(NamedTuple):
    """Channels removed together: input columns of the reader, output rows of the writers.

    Attributes:
      name: "heads" or "neurons"; of an expert such as "experts.3.neurons".
      reader: Linear that consumes the channels.
      writers: Linears that produce them. The last one is the linear path into the channel. Those
        before it gate it (SwiGLU's gate) or pair with it (q and k of attention).
      norms: Norms with a gain for each channel, over all units together, of what writers give.
    """

    name: str
    reader: Member
    writers: tuple[Member, ...]
    norms: tuple[Member, ...] = ()

    @property
    def kind(self) -> str:
        """Return "heads" or "neurons"."""
        return self.name.rpartition(".")[2]


def experts_of(block: Block) -> int:
    """Return the number of experts of a block, 0 without any.

    Args:
      block: Parameters or specs of the block.
    """
    return len(getattr(block, "experts", ()))


def has_linear(block: Block, slot: str) -> bool:
    """Return True if a block has a linear in a slot.

    Args:
      block: Parameters or specs of the block.
      slot: Name of the slot; of an expert's linear such as "experts.3.up".
    """
    name, expert, _ = split_name(slot)
    return getattr(block, name) is not None if expert is None else expert < experts_of(block)


def linear_of(block: Block, slot: str) -> Any:
    """Return the linear in a slot of a block, with specs in place of arrays in a block of specs.

    Args:
      block: Parameters or specs of the block.
      slot: Name of the slot; of an expert's linear such as "experts.3.up".
    """
    name, expert, field = split_name(slot)
    part = getattr(block, name)
    return part if expert is None else getattr(part[expert], field)


def with_linears(block: Block, linears: Mapping[str, Linear]) -> Block:
    """Return a block with other linears in some slots.

    Args:
      block: Parameters or specs of the block.
      linears: Slot -> linear.
    """
    fields: dict[str, Any] = {}
    for slot, new in linears.items():
        name, expert, field = split_name(slot)
        if expert is None:
            fields[name] = new
        else:
            experts = fields.setdefault(name, list(getattr(block, name)))
            experts[expert] = experts[expert].replace(**{field: new})
    return block.replace(**{n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()})


class Arch(NamedTuple):
    """Pure functions of a family with a configuration bound, hashable as a static argument of jit.

    A cached factory makes it, so equal configurations give one object. Its functions are the same
    objects wherever they compute the same, so a program compiled for the dense model also serves
    the pruned one.

    Attributes:
      config: Configuration of the family, such as `models.decoder_config.Config`.
      embed: (non_block, tokens int [b t], start=0) -> x [b t d]. `start` is the position of the
        first token, an int or traced.
      block: (block, x [b t d]) -> (x [b t d], taps).
      head: (non_block, x [b t d]) -> logits float32 [b t vocab].
      step: (block, x [b t d], cache, start) -> (x [b t d], cache). It runs `block` on the next t
        positions of a text whose earlier keys and values are in the cache. With `start` the int 0
        the cache is empty and the work is that of `block`.
      slots: Prunable linears of all kinds of blocks; `slots_of` has those of one.
      groups: Coupled channels of all kinds of blocks; `groups_of` has those of one.
      residual: True if the branches are added to the residual stream, with no norm of the sum.
      branch_norms: True if a norm follows the last linear of each branch before it is added.
      branch_scale: Factor of each branch before it is added.
      rescale: (block f, s float32 ()) -> block g with g(s x) = s f(x), but for the constants of
        norms. None where there is none, or where the head sees the scale of the stream.
    """

    config: Any
    embed: Callable[..., jax.Array]
    block: Callable[[Block, jax.Array], tuple[jax.Array, Taps]]
    head: Callable[[NonBlockParams, jax.Array], jax.Array]
    step: Callable[[Block, jax.Array, Cache, Start], tuple[jax.Array, Cache]]
    slots: tuple[Slot, ...]
    groups: tuple[Group, ...]
    residual: bool = True  # False for OPT-350M, whose blocks end in a norm
    branch_norms: bool = False
    branch_scale: float = 1.0
    rescale: Callable[[Any, jax.Array], Any] | None = None

    @property
    def has_experts(self) -> bool:
        """Return True if blocks may have experts."""
        return any(slot.part_of for slot in self.slots)

    @property
    def outputs_add(self) -> bool:
        """Return True if the outputs of the branches' last linears add up in the stream."""
        return self.residual and not self.branch_norms

    def tap(self, slot: str) -> str:
        """Return the tap that a slot reads.

        Args:
          slot: Name of the slot.

        Raises:
          KeyError: The architecture has no such slot.
        """
        return {s.name: s.reads for s in self.slots}[slot]

    def slots_of(self, block: Block) -> tuple[Slot, ...]:
        """Return the slots that a block has.

        Args:
          block: Parameters or specs of the block.
        """
        return tuple(s for s in self.slots if has_linear(block, s.name))

    def groups_of(self, block: Block, kind: str) -> tuple[Group, ...]:
        """Return the coupled groups of a kind that a block has.

        Args:
          block: Parameters or specs of the block.
          kind: "heads" or "neurons"; a block with experts has a group of neurons for each.
        """
        groups = (g for g in self.groups if g.kind == kind)
        return tuple(g for g in groups if has_linear(block, g.reader.name))

    def group(self, name: str) -> Group:
        """Return the coupled group of a name.

        Args:
          name: "heads", "neurons", or the name of an expert's group.

        Raises:
          KeyError: The architecture has no such group.
        """
        return {g.name: g for g in self.groups}[name]


class Model(NamedTuple):
    """Architecture with its parameters.

    Attributes:
      arch: Functions of the family.
      non_block: Parameters outside the blocks.
      blocks: Parameters of each block, a tuple or a lazy sequence that reads a checkpoint.
    """

    arch: Arch
    non_block: NonBlockParams
    blocks: Sequence[Block]


def logits(model: Model, tokens: jax.Array) -> jax.Array:
    """Compute the logits of a whole text.

    Args:
      model: Model whose blocks are visited in order.
      tokens: Token ids, int [b t].

    Returns:
      Logits, float32 [b t vocab].
    """
    x = model.arch.embed(model.non_block, tokens)
    # A loop, not a scan over stacked blocks: their widths may differ after pruning.
    for block in model.blocks:
        x, _ = model.arch.block(block, x)
    return model.arch.head(model.non_block, x)


@program("embedding", static=(0,))
def _embed(
    function: Callable[..., jax.Array], non_block: NonBlockParams, tokens: jax.Array
) -> jax.Array:
    return function(non_block, tokens)


def embed(arch: Arch, non_block: NonBlockParams, tokens: jax.Array) -> jax.Array:
    """Run `arch.embed`, compiled once for all parameters of equal shapes.

    Args:
      arch: Architecture.
      non_block: Parameters outside the blocks.
      tokens: Token ids, int [b t].

    Returns:
      Hidden states that enter the first block, [b t d].
    """
    # The function is the static argument, not `arch`: the written model's Arch differs, but its
    # functions are the same objects, so it runs what was compiled for the pruned one.
    return _embed(arch.embed, non_block, tokens)


@program("block", static=(0,))
def _apply(
    function: Callable[..., tuple[jax.Array, Taps]], block: Block, x: jax.Array
) -> jax.Array:
    # jit then drops the taps, which would hold the inputs of all linears.
    return function(block, x)[0]


def apply_block(arch: Arch, block: Block, x: jax.Array, name: str = "") -> jax.Array:
    """Run `arch.block` without its taps, compiled once for all blocks of equal shapes.

    Args:
      arch: Architecture.
      block: Parameters of the block.
      x: Hidden states, [b t d].
      name: Name of the program in a plan; empty for the default.

    Returns:
      Hidden states after the block, [b t d].
    """
    return _apply(arch.block, block, x, name=name)


def cross_entropy(
    arch: Arch, non_block: NonBlockParams, x: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Compute the mean cross-entropy of each window over its t - 1 predicted positions.

    Args:
      arch: Architecture.
      non_block: Parameters outside the blocks.
      x: Hidden states after the last block, [b t d].
      tokens: Token ids, int [b t].

    Returns:
      Cross-entropy in nats, float32 [b].
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
        # The last position predicts no token of the window.
        logits = head(non_block, x[None, :-1])[0]
        chosen = jnp.take_along_axis(logits, t[1:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    # One window at a time: the logits of one are already as large as a block's weights.
    return jax.lax.map(window, (x, tokens))
