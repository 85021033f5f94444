"""Hugging Face configurations and tensor names: `config.json` -> Arch, and a Spec of every tensor.

Names are given once, as pytrees of `Spec` with the structure of the parameters. Loading maps over
the specs, exporting zips two trees, and random initialisation is another map.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from models.arch import Arch, Block, NonBlockParams
from models.errors import InputError
from models.families import llama, opt
from models.families.fields import (
    REPAIR,
    Fields,
    check_granite,
    kind_of,
    read_biases,
    read_rope,
    read_widths,
    read_windows,
)
from models.layers import Linear, Norm

# Slot -> checkpoint name of its module within a block.
LLAMA_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
OPT_LINEARS = {
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q": "self_attn.q_proj",
    "o": "self_attn.out_proj",
    "fc1": "fc1",
    "fc2": "fc2",
}


class Spec(NamedTuple):
    """A tensor as checkpoints hold it.

    Attributes:
      name: Hugging Face name, such as "model.norm.weight".
      shape: Shape, linears [out in].
      init: Initialisation: "normal", "ones" or "zeros".
    """

    name: str
    shape: tuple[int, ...]
    init: str = "normal"


def _spec(name: str, shape: tuple[int, ...], init: str = "normal") -> Any:
    # Any: a tree of specs has the type of the tree of arrays that it describes.
    return Spec(name, shape, init)


def is_spec(x: object) -> bool:
    """Return True for a Spec, as `is_leaf` of `jax.tree.map`: it is a leaf, though a tuple.

    Args:
      x: Node of a tree.
    """
    return isinstance(x, Spec)


def _llama_biases(f: Fields, kind: str) -> tuple[str, ...]:
    """Return the slots of a stock LLaMA-family model that have a bias."""
    # Qwen2 always has biases on queries, keys and values; its configuration has no field for it.
    if kind == "qwen2":
        return ("q", "k", "v")
    biases: tuple[str, ...] = ()
    if kind in ("llama", "granite"):
        if f.flag("attention_bias", False):
            biases += ("q", "k", "v", "o")
        if f.flag("mlp_bias", False):
            biases += ("gate", "up", "down")
    return biases


def _llama(config: Mapping[str, Any]) -> Arch:
    f, kind = Fields(config), kind_of(config)
    dim, n = f.count("hidden_size"), f.count("num_attention_heads")
    kv = f.count("num_key_value_heads", n)
    if n % kv:
        raise InputError(
            f"config.json: num_attention_heads={n} is not a multiple of num_key_value_heads={kv}",
            REPAIR,
        )
    # With head_dim given, heads need not make up the hidden size: pruned models rely on it.
    if config.get("head_dim") is None and dim % n:
        raise InputError(
            f"config.json: hidden_size={dim} is not a multiple of num_attention_heads={n}, and "
            "head_dim is not given",
            REPAIR,
        )
    head_dim = f.count("head_dim", dim // n)
    if head_dim % 2:
        raise InputError(
            f"config.json: head_dim={head_dim} must be even, for rotary positions", REPAIR
        )
    if kind == "granite":
        check_granite(f, head_dim)
    # Defaults are those of transformers, which leaves fields that equal them out of the file.
    return llama.arch(
        llama.Config(
            head_dim=head_dim,
            eps=f.number("rms_norm_eps", 1e-6),
            act=f.act("hidden_act", "silu"),
            rope=read_rope(f),
            windows=read_windows(f, kind, f.count("num_hidden_layers")),
            dim=dim,
            ffn_dim=f.count("intermediate_size"),
            query_heads=n,
            kv_heads=kv,
            vocab=f.count("vocab_size"),
            tied=f.flag("tie_word_embeddings", False),
            biases=read_biases(f, LLAMA_LINEARS, _llama_biases(f, kind)),
            widths=read_widths(f),
        )
    )


def _opt(config: Mapping[str, Any]) -> Arch:
    f = Fields(config)
    dim, n = f.count("hidden_size"), f.count("num_attention_heads")
    if dim % n:
        raise InputError(
            f"config.json: hidden_size={dim} is not a multiple of num_attention_heads={n}", REPAIR
        )
    # False in OPT-350m alone, which then has no final norm either.
    pre_norm = f.flag("do_layer_norm_before", True)
    stock_biases = tuple(OPT_LINEARS) if f.flag("enable_bias", True) else ()
    # Defaults are those of transformers, as for LLaMA.
    return opt.arch(
        opt.Config(
            head_dim=dim // n,
            act=f.act("activation_function", "relu"),
            pre_norm=pre_norm,
            final_norm=pre_norm and not f.flag("_remove_final_layer_norm", False),
            dim=dim,
            word_dim=f.count("word_embed_proj_dim", dim),
            ffn_dim=f.count("ffn_dim"),
            vocab=f.count("vocab_size"),
            positions=f.count("max_position_embeddings", 2048),
            affine=f.flag("layer_norm_elementwise_affine", True),
            tied=f.flag("tie_word_embeddings", True),
            biases=read_biases(f, OPT_LINEARS, stock_biases),
            widths=read_widths(f),
        )
    )


def _linear(name: str, out: int, into: int, bias: bool) -> Linear:
    return Linear(
        _spec(f"{name}.weight", (out, into)),
        _spec(f"{name}.bias", (out,), "zeros") if bias else None,
    )


def _llama_non_block(c: llama.Config) -> llama.NonBlockParams:
    return llama.NonBlockParams(
        embed=_spec("model.embed_tokens.weight", (c.vocab, c.dim)),
        norm=Norm(_spec("model.norm.weight", (c.dim,), "ones")),
        head=None if c.tied else _linear("lm_head", c.vocab, c.dim, False),
    )


def _llama_block(c: llama.Config, i: int) -> llama.Block:
    p = f"model.layers.{i}."
    kv_heads, neurons = c.widths[i] if c.widths else (c.kv_heads, c.ffn_dim)
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
    linears = {
        slot: _linear(p + name, *shapes[slot], slot in c.biases)
        for slot, name in LLAMA_LINEARS.items()
    }
    return llama.Block(
        attn_norm=Norm(_spec(p + "input_layernorm.weight", (c.dim,), "ones")),
        mlp_norm=Norm(_spec(p + "post_attention_layernorm.weight", (c.dim,), "ones")),
        window=c.windows[i],
        **linears,
    )


def _opt_norm(c: opt.Config, name: str) -> Norm:
    if not c.affine:
        return Norm()
    return Norm(_spec(f"{name}.weight", (c.dim,), "ones"), _spec(f"{name}.bias", (c.dim,), "zeros"))


def _opt_non_block(c: opt.Config) -> opt.NonBlockParams:
    # OPT-350M embeds in 512 channels and projects to 1,024.
    p, projected = "model.decoder.", c.word_dim != c.dim
    return opt.NonBlockParams(
        embed=_spec(p + "embed_tokens.weight", (c.vocab, c.word_dim)),
        positions=_spec(p + "embed_positions.weight", (c.positions + opt.POSITION_OFFSET, c.dim)),
        norm=_opt_norm(c, p + "final_layer_norm") if c.final_norm else None,
        project_in=_linear(p + "project_in", c.dim, c.word_dim, False) if projected else None,
        project_out=_linear(p + "project_out", c.word_dim, c.dim, False) if projected else None,
        head=None if c.tied else _linear("lm_head", c.vocab, c.word_dim, False),
    )


def _opt_block(c: opt.Config, i: int) -> opt.Block:
    p = f"model.decoder.layers.{i}."
    heads, neurons = c.widths[i] if c.widths else (c.dim // c.head_dim, c.ffn_dim)
    n = heads * c.head_dim
    shapes = {
        "k": (n, c.dim),
        "v": (n, c.dim),
        "q": (n, c.dim),
        "o": (c.dim, n),
        "fc1": (neurons, c.dim),
        "fc2": (c.dim, neurons),
    }
    linears = {
        slot: _linear(p + name, *shapes[slot], slot in c.biases)
        for slot, name in OPT_LINEARS.items()
    }
    return opt.Block(
        attn_norm=_opt_norm(c, p + "self_attn_layer_norm"),
        # OPT gives this norm of each block the same name as the model's last one.
        mlp_norm=_opt_norm(c, p + "final_layer_norm"),
        **linears,
    )


class Family(NamedTuple):
    """Spelling of one family's configuration and tensors.

    Attributes:
      neurons: Configuration field of the feed-forward width.
      linears: Checkpoint name of each slot's module within a block.
      arch: `config.json` -> Arch.
      non_block: Family's configuration -> specs of the parameters outside the blocks.
      block: (family's configuration, i) -> specs of block i.
    """

    neurons: str
    linears: Mapping[str, str]
    arch: Callable[[Mapping[str, Any]], Arch]
    non_block: Callable[[Any], NonBlockParams]
    block: Callable[[Any, int], Block]


LLAMA = Family("intermediate_size", LLAMA_LINEARS, _llama, _llama_non_block, _llama_block)
OPT = Family("ffn_dim", OPT_LINEARS, _opt, _opt_non_block, _opt_block)
# Types that compute the same function with other defaults share a family.
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "granite": LLAMA, "opt": OPT}


def family(config: Mapping[str, Any]) -> Family:
    """Return the family of a configuration.

    Args:
      config: Contents of `config.json`.

    Returns:
      Family that its `model_type` belongs to.

    Raises:
      InputError: The `model_type` is not supported, or the checkpoint is quantised.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind_of(config) not in FAMILIES:
        raise InputError(
            f"config.json: model_type {kind!r} is not supported",
            f"it must be one of {', '.join(sorted(FAMILIES))}",
        )
    # Quantised tensors have other names and types; scores need the real weights.
    if config.get("quantization_config"):
        raise InputError("config.json: the checkpoint is quantised", "save it dequantised first")
    return FAMILIES[kind_of(config)]


def specs(config: Mapping[str, Any]) -> tuple[Arch, NonBlockParams, tuple[Block, ...]]:
    """Describe the architecture and every tensor of a configuration.

    Args:
      config: Contents of `config.json`.

    Returns:
      Architecture, parameters outside the blocks and parameters of each block, with a Spec in
      place of every array.

    Raises:
      InputError: The configuration is wrong or not supported.
    """
    own = family(config)
    arch = own.arch(config)
    count = Fields(config).count("num_hidden_layers")
    return arch, own.non_block(arch.config), tuple(own.block(arch.config, i) for i in range(count))


def linear_name(block: Block, slot: str) -> str:
    """Return the checkpoint name of a linear, such as "model.layers.0.mlp.up_proj".

    Args:
      block: Specs of a block.
      slot: Slot of the linear.
    """
    return getattr(block, slot).w.name.removesuffix(".weight")


def shallower(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the configuration of the model that has only some blocks.

    Args:
      config: Contents of `config.json`.
      kept: Indices of the blocks that stay, in order.

    Returns:
      Configuration in which the settings of each block follow the block.
    """
    new = {**config, "num_hidden_layers": len(kept)}
    # OPT has no windows.
    windows = getattr(family(config).arch(config).config, "windows", ())
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == config["num_hidden_layers"]:
        new["layer_types"] = [types[i] for i in kept]
    elif any(windows) and kind_of(config) == "qwen2":
        # Qwen2 infers from a block's number that it has a window; the numbers have changed.
        new["layer_types"] = ["sliding_attention" if windows[i] else "full_attention" for i in kept]
    widths = config.get("widths")
    if isinstance(widths, dict):
        new["widths"] = {name: [counts[i] for i in kept] for name, counts in widths.items()}
    return new
