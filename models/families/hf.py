"""Hugging Face configurations and tensor names: `config.json` -> Arch, and the name and shape of every tensor of a model.

The names are given once, as pytrees of `Spec` with the structure of the parameters themselves, so loading is a map over the specs,
exporting a zip of two trees, and random initialisation another map.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from models.arch import Arch, Block, NonBlockParams
from models.errors import InputError
from models.families import llama, opt
from models.layers import ACTIVATIONS, Linear, Norm, Rope

ROPE_KINDS = ("default", "linear", "dynamic", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")
WINDOW = 4096  # Mistral's and Qwen2's sliding window where the file leaves it out
OWN = "topiary_"  # begins the model_type of a checkpoint whose blocks differ in width: the stock type it is made from follows
MEND = "mend the file or fetch the checkpoint again"


class Spec(NamedTuple):
    """A tensor as checkpoints hold it: its name, its shape, and whether initialisation makes it ones, zeros or normal."""

    name: str
    shape: tuple[int, ...]
    init: str = "normal"


def _spec(name: str, shape: tuple[int, ...], init: str = "normal") -> Any:
    # Any: a tree of specs has the type of the tree of arrays that it describes.
    return Spec(name, shape, init)


def is_spec(x: object) -> bool:
    """For `jax.tree.map(..., is_leaf=is_spec)`: a Spec is a leaf, though a tuple."""
    return isinstance(x, Spec)


class Fields:
    """Checked reading of a `config.json`: every error names the field."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`; InputError otherwise, or when it is missing and has no default."""
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(
                f"config.json: {name} must be an integer of {least} or more, not {value!r}: {MEND}"
            )
        return value

    def number(self, name: str, default: float) -> float:
        """A positive, finite number; InputError otherwise."""
        value = self.config.get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise InputError(
                f"config.json: {name} must be a positive number, not {value!r}: {MEND}"
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean, null meaning the default; InputError otherwise."""
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise InputError(f"config.json: {name} must be true or false, not {value!r}: {MEND}")
        return value

    def act(self, name: str, default: str) -> str:
        """A known activation function's name; InputError otherwise."""
        value = self.config.get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise InputError(
                f"config.json: {name}={value!r} is not supported: it must be one of {', '.join(sorted(ACTIVATIONS))}"
            )
        return value

    def section(self, name: str) -> Mapping[str, Any]:
        """A JSON object, empty when missing or null; InputError otherwise."""
        value = self.config.get(name) or {}
        if not isinstance(value, Mapping):
            raise InputError(f"config.json: {name} must be an object, not {value!r}: {MEND}")
        return value


def _rope(f: Fields) -> Rope:
    """Rotary settings from either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters` (transformers 5)."""
    given = {**f.section("rope_scaling"), **f.section("rope_parameters")}
    g = Fields(given)
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind not in ROPE_KINDS:
        raise InputError(
            f"config.json: rope type {kind!r} is not supported: it must be one of {', '.join(ROPE_KINDS)}"
        )
    if g.number("partial_rotary_factor", f.number("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError("config.json: partial_rotary_factor other than 1 is not supported")
    longest = f.count("max_position_embeddings", 2048)
    low, high = g.number("low_freq_factor", 1.0), g.number("high_freq_factor", 4.0)
    if low >= high:
        raise InputError(
            f"config.json: low_freq_factor={low} must be less than high_freq_factor={high}: {MEND}"
        )
    return Rope(
        theta=g.number("rope_theta", f.number("rope_theta", 10000.0)),
        kind=kind,
        factor=g.number("factor", 1.0),
        max_positions=g.count("original_max_position_embeddings", longest)
        if kind == "llama3"
        else longest,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _windows(f: Fields, kind: str, blocks: int) -> tuple[int | None, ...]:
    """Each block's sliding window, None for full attention."""
    on = kind == "mistral" or (kind == "qwen2" and f.flag("use_sliding_window", False))
    if not on or f.config.get("sliding_window", WINDOW) is None:
        return (None,) * blocks
    window = f.count("sliding_window", WINDOW)
    if kind == "mistral":
        return (window,) * blocks
    full = f.count("max_window_layers", 28, least=0)
    kinds = f.config.get("layer_types") or [
        "full_attention" if i < full else "sliding_attention" for i in range(blocks)
    ]
    if (
        not isinstance(kinds, list)
        or len(kinds) != blocks
        or any(k not in LAYER_TYPES for k in kinds)
    ):
        raise InputError(
            f"config.json: layer_types must be a list of {blocks} words out of {', '.join(LAYER_TYPES)}: {MEND}"
        )
    return tuple(window if k == "sliding_attention" else None for k in kinds)


def kind_of(config: Mapping[str, Any]) -> str:
    """The stock `model_type` that a configuration has, or is made from."""
    return str(config["model_type"]).removeprefix(OWN)


def _widths(f: Fields) -> tuple[tuple[int, int], ...]:
    """(units of heads, neurons) of every block of a model of our own type, else ()."""
    if not str(f.config["model_type"]).startswith(OWN):
        return ()
    both = [f.section("widths").get(name) for name in ("heads", "neurons")]
    count = f.count("num_hidden_layers")
    for w in both:
        if (
            not isinstance(w, list)
            or len(w) != count
            or not all(type(n) is int and n > 0 for n in w)
        ):
            raise InputError(
                f"config.json: widths must have {count} positive integers for heads and as many for neurons: {MEND}"
            )
    return tuple(zip(*both, strict=True))


def _biases(f: Fields, linears: Mapping[str, str], stock: tuple[str, ...]) -> tuple[str, ...]:
    """The slots with a bias: those that a model of our own type lists by their module's name, else `stock`."""
    if not str(f.config["model_type"]).startswith(OWN):
        return stock
    listed = f.config.get("biases")
    if not isinstance(listed, list) or not set(listed) <= set(linears.values()):
        raise InputError(
            f"config.json: biases must be a list of words out of {', '.join(linears.values())}: {MEND}"
        )
    return tuple(slot for slot, name in linears.items() if name in listed)


def granite_identity(head_dim: int) -> dict[str, float]:
    """The multipliers with which a granite model is a LLaMA model."""
    return dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0) | {
        "attention_multiplier": head_dim**-0.5
    }


def _check_identity(f: Fields, head_dim: int) -> None:
    """InputError unless a granite model's multipliers make it a LLaMA model."""
    for name, value in granite_identity(head_dim).items():
        if abs(f.number(name, 1.0) - value) > 1e-6 * value:
            raise InputError(
                f"config.json: a granite model with {name}={f.number(name, 1.0)} is not supported, only with {value:g}"
            )


def _llama(config: Mapping[str, Any]) -> Arch:
    f, kind = Fields(config), kind_of(config)
    dim, n = f.count("hidden_size"), f.count("num_attention_heads")
    kv = f.count("num_key_value_heads", n)
    if n % kv:
        raise InputError(
            f"config.json: num_attention_heads={n} is not a multiple of num_key_value_heads={kv}"
        )
    if config.get("head_dim") is None and dim % n:
        raise InputError(
            f"config.json: hidden_size={dim} is not a multiple of num_attention_heads={n}, and head_dim is not given"
        )
    head_dim = f.count("head_dim", dim // n)
    if head_dim % 2:
        raise InputError(
            f"config.json: head_dim={head_dim} must be even, for rotary positions: {MEND}"
        )
    if kind == "granite":
        _check_identity(f, head_dim)
    flags = kind in ("llama", "granite")
    attention = (
        ("q", "k", "v", "o")
        if flags and f.flag("attention_bias", False)
        else ("q", "k", "v")
        if kind == "qwen2"
        else ()
    )
    mlp = ("gate", "up", "down") if flags and f.flag("mlp_bias", False) else ()
    return llama.arch(
        llama.Config(
            head_dim=head_dim,
            eps=f.number("rms_norm_eps", 1e-6),
            act=f.act("hidden_act", "silu"),
            rope=_rope(f),
            windows=_windows(f, kind, f.count("num_hidden_layers")),
            dim=dim,
            ffn_dim=f.count("intermediate_size"),
            query_heads=n,
            kv_heads=kv,
            vocab=f.count("vocab_size"),
            tied=f.flag("tie_word_embeddings", False),
            biases=_biases(f, LLAMA_LINEARS, (*attention, *mlp)),
            widths=_widths(f),
        )
    )


def _opt(config: Mapping[str, Any]) -> Arch:
    f = Fields(config)
    dim, n = f.count("hidden_size"), f.count("num_attention_heads")
    if dim % n:
        raise InputError(
            f"config.json: hidden_size={dim} is not a multiple of num_attention_heads={n}"
        )
    pre_norm = f.flag("do_layer_norm_before", True)
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
            biases=_biases(
                f, OPT_LINEARS, tuple(OPT_LINEARS) if f.flag("enable_bias", True) else ()
            ),
            widths=_widths(f),
        )
    )


def _linear(name: str, out: int, into: int, bias: bool) -> Linear:
    return Linear(
        _spec(f"{name}.weight", (out, into)),
        _spec(f"{name}.bias", (out,), "zeros") if bias else None,
    )


def _llama_ends(c: llama.Config) -> llama.NonBlockParams:
    head = None if c.tied else _linear("lm_head", c.vocab, c.dim, False)
    embed = _spec("model.embed_tokens.weight", (c.vocab, c.dim))
    return llama.NonBlockParams(embed, Norm(_spec("model.norm.weight", (c.dim,), "ones")), head)


# Slot -> the checkpoint's name of its module within a block.
LLAMA_LINEARS = {f: f"self_attn.{f}_proj" for f in "qkvo"} | {
    f: f"mlp.{f}_proj" for f in ("gate", "up", "down")
}
OPT_LINEARS = {f: f"self_attn.{f}_proj" for f in "kvq"} | {
    "o": "self_attn.out_proj",
    "fc1": "fc1",
    "fc2": "fc2",
}


def _llama_block(c: llama.Config, i: int) -> llama.Block:
    p = f"model.layers.{i}."
    kv_heads, neurons = c.widths[i] if c.widths else (c.kv_heads, c.ffn_dim)
    n, kv = kv_heads * c.query_heads // c.kv_heads * c.head_dim, kv_heads * c.head_dim
    shapes = {"q": (n, c.dim), "k": (kv, c.dim), "v": (kv, c.dim), "o": (c.dim, n)}
    shapes |= {"gate": (neurons, c.dim), "up": (neurons, c.dim), "down": (c.dim, neurons)}
    return llama.Block(
        attn_norm=Norm(_spec(p + "input_layernorm.weight", (c.dim,), "ones")),
        mlp_norm=Norm(_spec(p + "post_attention_layernorm.weight", (c.dim,), "ones")),
        window=c.windows[i],
        **{
            slot: _linear(p + name, *shapes[slot], slot in c.biases)
            for slot, name in LLAMA_LINEARS.items()
        },
    )


def _opt_norm(c: opt.Config, name: str) -> Norm:
    return (
        Norm(_spec(f"{name}.weight", (c.dim,), "ones"), _spec(f"{name}.bias", (c.dim,), "zeros"))
        if c.affine
        else Norm()
    )


def _opt_ends(c: opt.Config) -> opt.NonBlockParams:
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
    units, neurons = c.widths[i] if c.widths else (c.dim // c.head_dim, c.ffn_dim)
    n = units * c.head_dim
    shapes = dict.fromkeys("kvq", (n, c.dim)) | {
        "o": (c.dim, n),
        "fc1": (neurons, c.dim),
        "fc2": (c.dim, neurons),
    }
    return opt.Block(
        attn_norm=_opt_norm(c, p + "self_attn_layer_norm"),
        mlp_norm=_opt_norm(c, p + "final_layer_norm"),
        **{
            slot: _linear(p + name, *shapes[slot], slot in c.biases)
            for slot, name in OPT_LINEARS.items()
        },
    )


class Family(NamedTuple):
    """How one family's configuration and names are written. `neurons` is the configuration's word for the feed-forward width, `linears`
    the checkpoint's name of each slot's module within a block.
    """

    neurons: str
    linears: Mapping[str, str]
    arch: Callable[[Mapping[str, Any]], Arch]
    non_block: Callable[[Any], NonBlockParams]
    block: Callable[[Any, int], Block]


LLAMA = Family("intermediate_size", LLAMA_LINEARS, _llama, _llama_ends, _llama_block)
OPT = Family("ffn_dim", OPT_LINEARS, _opt, _opt_ends, _opt_block)
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "granite": LLAMA, "opt": OPT}


def family(config: Mapping[str, Any]) -> Family:
    """The family of a configuration's `model_type`; InputError when it is not one of ours."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind_of(config) not in FAMILIES:
        raise InputError(
            f"config.json: model_type {kind!r} is not supported: it must be one of {', '.join(sorted(FAMILIES))}"
        )
    if config.get("quantization_config"):
        raise InputError("config.json: the checkpoint is quantised: save it dequantised first")
    return FAMILIES[kind_of(config)]


def specs(config: Mapping[str, Any]) -> tuple[Arch, NonBlockParams, tuple[Block, ...]]:
    """The architecture of a configuration, and its parameter trees with a Spec for every tensor."""
    own = family(config)
    arch = own.arch(config)
    count = Fields(config).count("num_hidden_layers")
    return arch, own.non_block(arch.config), tuple(own.block(arch.config, i) for i in range(count))


def linear_name(block: Block, slot: str) -> str:
    """The checkpoint's name of a block spec's linear, without `.weight`: "model.layers.0.mlp.up_proj"."""
    return getattr(block, slot).w.name.removesuffix(".weight")


def shallower(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The configuration of the model with these blocks alone, in this order; what it says of each block goes with the block."""
    new = {**config, "num_hidden_layers": len(kept)}
    windows = getattr(family(config).arch(config).config, "windows", ())
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == config["num_hidden_layers"]:
        new["layer_types"] = [types[i] for i in kept]
    elif (
        any(windows) and kind_of(config) == "qwen2"
    ):  # which blocks have a window follows from their number
        new["layer_types"] = ["sliding_attention" if windows[i] else "full_attention" for i in kept]
    if isinstance(widths := config.get("widths"), dict):
        new["widths"] = {name: [of_blocks[i] for i in kept] for name, of_blocks in widths.items()}
    return new
