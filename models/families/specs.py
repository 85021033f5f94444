"""Tensors as checkpoints hold them, and the specs of the decoder families' parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from models import decoder, decoder_config
from models.arch import Arch, Block, NonBlockParams
from models.experts import Expert
from models.layers import Linear, Norm


class Spec(NamedTuple):
    """A tensor as checkpoints hold it.

    Attributes:
      name: Hugging Face name, such as "model.norm.weight". Parts of a fused tensor have the part
        in brackets, such as "model.layers.0.self_attn.qkv_proj[q].weight".
      shape: Shape, linears [out in].
      init: Initialisation: "normal", "ones" or "zeros".
    """

    name: str
    shape: tuple[int, ...]
    init: str = "normal"


def make_spec(name: str, shape: tuple[int, ...], init: str = "normal") -> Any:
    """Make a Spec, typed as the array that it describes.

    Args:
      name: As in `Spec`.
      shape: As in `Spec`.
      init: As in `Spec`.
    """
    # Any: a tree of specs has the type of the tree of arrays that it describes.
    return Spec(name, shape, init)


def is_spec(x: object) -> bool:
    """Return True for a Spec, as `is_leaf` of `jax.tree.map`: it is a leaf, though a tuple.

    Args:
      x: Node of a tree.
    """
    return isinstance(x, Spec)


def linear_spec(name: str, out: int, into: int, bias: bool) -> Linear:
    """Return the specs of a linear.

    Args:
      name: Checkpoint name of its module.
      out: Number of outputs.
      into: Number of inputs.
      bias: True if it has a bias.
    """
    return Linear(
        make_spec(f"{name}.weight", (out, into)),
        make_spec(f"{name}.bias", (out,), "zeros") if bias else None,
    )


def _narrow(c: Any, dim: int) -> dict[str, Any]:
    """Return the fields of a decoder with another hidden size, whose heads stay as they are."""
    return {"hidden_size": dim, "head_dim": c.head_dim}


class Family(NamedTuple):
    """Spelling of one family's configuration and tensors.

    Attributes:
      config_class: Name of transformers' configuration class.
      model_class: Name of its causal language model.
      linears: Checkpoint name of each slot's module within a block.
      arch: `config.json` -> Arch.
      non_block: Family's configuration -> specs of the parameters outside the blocks.
      block: (family's configuration, i) -> specs of block i.
      lists: Family's configuration -> fields of `config.json` with one entry a block, which a
        shallower model must have.
      bias_flags: Fields that give slots a bias, with the slots.
      can_hold: Family's configuration -> True if transformers' class takes its head count.
      neurons: Configuration field of the feed-forward width.
      expert_neurons: Configuration field of the width of an expert; empty without experts.
      experts: Configuration fields that hold the number of experts, all alike.
      renumber: (family's configuration, blocks that stay) -> fields that name blocks by number.
      narrow: (family's configuration, hidden size) -> fields of a model with a narrower stream.
      remote: Name of the file in models/checkpoint/remote with the class of ragged models.
    """

    config_class: str
    model_class: str
    linears: Mapping[str, str]
    arch: Callable[[Mapping[str, Any]], Arch]
    non_block: Callable[[Any], NonBlockParams]
    block: Callable[[Any, int], Block]
    lists: Callable[[Any], dict[str, list[Any]]] = lambda config: {}
    bias_flags: Mapping[str, tuple[str, ...]] = {}
    can_hold: Callable[[Any], bool] = lambda config: True
    neurons: str = "intermediate_size"
    expert_neurons: str = ""
    experts: tuple[str, ...] = ()
    renumber: Callable[[Any, Sequence[int]], dict[str, Any]] = lambda config, kept: {}
    remote: str = "decoder"
    narrow: Callable[[Any, int], dict[str, Any]] = _narrow


class Names(NamedTuple):
    """Checkpoint names of a decoder family's modules.

    Attributes:
      linears: Module of each slot within a block.
      norms: Module of each of the block's norms, by the field that holds it.
      final_norm: Module of the final norm.
      router: Module of the router within a block with experts.
      experts: Module of each linear of an expert, with {} for the expert's number.
    """

    linears: Mapping[str, str]
    norms: Mapping[str, str]
    final_norm: str = "model.norm"
    router: str = ""
    experts: Mapping[str, str] = {}


def _norm(c: decoder_config.Config, name: str, size: int) -> Norm:
    """Return the specs of a norm at its identity."""
    start = "zeros" if c.static.norm == "rms_offset" else "ones"
    has_bias = c.static.norm == "layer"
    return Norm(
        make_spec(f"{name}.weight", (size,), start),
        make_spec(f"{name}.bias", (size,), "zeros") if has_bias else None,
    )


def decoder_non_block(names: Names, c: decoder_config.Config) -> decoder.NonBlockParams:
    """Return the specs of the parameters outside the blocks.

    Args:
      names: Names of the family.
      c: Configuration.
    """
    return decoder.NonBlockParams(
        embed=make_spec("model.embed_tokens.weight", (c.vocab, c.dim)),
        norm=_norm(c, names.final_norm, c.dim),
        head=None if c.tied else linear_spec("lm_head", c.vocab, c.dim, c.head_bias),
    )


def decoder_block(names: Names, c: decoder_config.Config, i: int) -> decoder.Block:
    """Return the specs of a block.

    Args:
      names: Names of the family.
      c: Configuration.
      i: Index of the block.
    """
    p = f"model.layers.{i}."
    sparse = bool(c.sparse) and c.sparse[i]
    own_neurons = c.expert_neurons if sparse else c.ffn_dim
    kv_heads, neurons = c.widths[i] if c.widths else (c.kv_heads, own_neurons)
    kv = kv_heads * c.head_dim
    # A key-value head keeps all the query heads that share it.
    n = kv_heads * c.query_heads // c.kv_heads * c.head_dim
    shapes = {
        "q": (n, c.dim),
        "k": (kv, c.dim),
        "v": (kv, c.dim),
        "o": (c.dim, n),
        "gate": (neurons, c.dim),
        "up": (neurons, c.dim),
        "down": (c.dim, neurons),
    }
    linears: dict[str, Linear | None] = dict.fromkeys(shapes)
    for slot, name in names.linears.items():
        if not (sparse and slot in names.experts):
            linears[slot] = linear_spec(p + name, *shapes[slot], slot in c.biases)
    norms: dict[str, Norm | None] = {"attn_norm": None, "mlp_norm": None}
    whole = c.qk_norm == "whole"
    sizes = {"q_norm": n if whole else c.head_dim, "k_norm": kv if whole else c.head_dim}
    for field, name in names.norms.items():
        if c.qk_norm or field not in sizes:
            norms[field] = _norm(c, p + name, sizes.get(field, c.dim))
    # Any: the fields differ between families, so they are given by name.
    fields: dict[str, Any] = {**linears, **norms}
    if sparse:
        fields["router"] = linear_spec(p + names.router, c.experts, c.dim, bias=False)
        fields["experts"] = tuple(
            Expert(
                **{
                    slot: linear_spec(p + name.format(e), *shapes[slot], bias=False)
                    for slot, name in names.experts.items()
                }
            )
            for e in range(c.experts)
        )
    return decoder.Block(**fields, window=c.windows[i], rope=c.rope_of(i))
