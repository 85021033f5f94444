"""Settings of `models.decoder`: the switches of its functions, and the sizes of the dense model."""

import dataclasses
from typing import Literal, NamedTuple

from models.experts import RouterConfig
from models.rotary import Rope

# "rms": LLaMA's. "rms_float32": scaled before the cast, OLMo2's. "rms_offset": so, and the scale is
# stored less one, Gemma's. "layer": a layer norm.
NormKind = Literal["rms", "rms_float32", "rms_offset", "layer"]


class StaticConfig(NamedTuple):
    """Settings that the functions depend on; everything else is in the parameters.

    Attributes:
      head_dim: Size of a head.
      eps: Constant of the norms.
      act: Name of the activation.
      norm: Kind of all norms.
      parallel: True if both branches read the one norm of a block, as in Phi.
      attention_scale: Factor of the products of queries and keys; None for head_dim ** -0.5.
      attention_cap: Bound of these products; None without one.
      embed_scale: Factor of the embedding.
      embed_scale_rounded: True if that factor is rounded to the model's type first, as in Gemma.
      branch_scale: Factor of each branch's output before it is added to the stream.
      logits_divisor: Divisor of the logits.
      logits_cap: Bound that a tanh puts on the logits; None without one.
      qkv_cap: Bound at which queries, keys and values are clipped; None without one.
      router: Settings of the routers; None without experts.
    """

    head_dim: int
    eps: float
    act: str
    norm: NormKind = "rms"
    parallel: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    embed_scale: float = 1.0
    embed_scale_rounded: bool = False
    branch_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_cap: float | None = None
    qkv_cap: float | None = None
    router: RouterConfig | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings that cannot be inferred from parameter shapes, with the sizes of the dense model.

    Attributes:
      static: Settings that the functions compute with.
      rope: Rotary settings.
      local_rope: Rotary settings of blocks with a window, where they have their own.
      rotary: False for each block without rotary positions; empty if all have them.
      windows: Sliding window of each block in positions, None for full attention.
      dim: Hidden size.
      ffn_dim: Neurons of a block.
      query_heads: Query heads of a block.
      kv_heads: Key-value heads of a block.
      vocab: Number of tokens.
      tied: True if the embedding serves as the head.
      gated: True if the feed-forward part has a gate.
      branch_norms: True if a norm follows each branch, before it is added to the stream.
      qk_norm: "" without norms of queries and keys, "head" for one over each head's channels,
        "whole" for one over all heads together.
      biases: Slots that have a bias.
      head_bias: True if the output head has a bias.
      widths: Key-value heads and neurons of each block where blocks differ, else empty.
      experts: Experts of a block that has them; 0 without experts.
      expert_neurons: Neurons of each expert.
      sparse: True for each block with experts; empty if there is none.
    """

    static: StaticConfig
    rope: Rope = dataclasses.field(default_factory=Rope)
    local_rope: Rope | None = None
    rotary: tuple[bool, ...] = ()
    windows: tuple[int | None, ...] = ()
    dim: int = 0
    ffn_dim: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    vocab: int = 0
    tied: bool = False
    gated: bool = True
    branch_norms: bool = False
    qk_norm: Literal["", "head", "whole"] = ""
    biases: tuple[str, ...] = ()
    head_bias: bool = False
    widths: tuple[tuple[int, int], ...] = ()
    experts: int = 0
    expert_neurons: int = 0
    sparse: tuple[bool, ...] = ()

    @property
    def head_dim(self) -> int:
        """Return the size of a head."""
        return self.static.head_dim

    @property
    def act(self) -> str:
        """Return the name of the activation, a key of `models.layers.ACTIVATIONS`."""
        return self.static.act

    @property
    def heads_fill_stream(self) -> bool:
        """Return True if the stock class needs query heads that make up the hidden size."""
        # OLMoE's norm of the queries is as wide as the hidden size.
        return self.qk_norm == "whole" and bool(self.experts)

    @property
    def stream_multiple(self) -> int:
        """Return a number that the hidden size must be a multiple of, for every stock type."""
        if self.heads_fill_stream:
            return self.head_dim * (self.query_heads // self.kv_heads)
        return self.query_heads

    @property
    def restart(self) -> int | None:
        """Return the length beyond which all rotary angles differ, so that caches begin anew."""
        return self.rope.max_positions if self.rope.kind == "longrope" else None

    def rope_of(self, i: int) -> Rope | None:
        """Return the rotary settings of a block, None without rotary positions.

        Args:
          i: Index of the block.
        """
        if self.rotary and not self.rotary[i]:
            return None
        is_local = self.local_rope is not None and self.windows[i] is not None
        return self.local_rope if is_local else self.rope


def as_llama(c: Config) -> Config:
    """Return the settings with every switch as in a LLaMA model; equal if it is one.

    Args:
      c: Settings of a model.
    """
    static = StaticConfig(c.head_dim, c.static.eps, c.static.act)
    return dataclasses.replace(
        c,
        static=static,
        local_rope=None,
        rotary=(),
        gated=True,
        branch_norms=False,
        qk_norm="",
        head_bias=False,
    )
