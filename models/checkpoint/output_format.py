"""What a pruned model is written as: the plainest configuration that holds its shapes and biases.

The model's own type where that holds them; then stock `llama`, `mistral` (any number of heads, no biases) and `granite` (both, with
multipliers that multiply by one), which compute the same function; then a small class that ships with the checkpoint, for blocks that
differ in width. A stock form is taken only if reading it back gives the architecture that was meant: no field is silently ignored.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from models.arch import Arch, Block
from models.errors import InputError
from models.families import hf
from models.surgery import units

Layout = Literal["auto", "padded"]
NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "granite": "Granite",
    "opt": "OPT",
}
CODE = "modeling_pruned.py"  # the class that ships with a checkpoint of our own type


class Shape(NamedTuple):
    """Units of a block's coupled groups: attention heads (with grouped-query attention key-value heads) and neurons."""

    heads: int
    neurons: int


class ShapeChange(NamedTuple):
    """What a method leaves, as far as is known before it runs: the groups that get narrower, whether by as much in every block, and
    whether the readers of these groups get biases."""

    narrower: tuple[str, ...] = ()
    alike: bool = True
    biased: bool = False


class Form(NamedTuple):
    """How a model is written. `code` is the class that ships with it, None for a stock one, whose blocks are all as wide as the
    configuration says: narrower ones are to be padded."""

    config: dict[str, Any]
    code: str | None = None

    @property
    def label(self) -> str:
        """What it loads as, for people."""
        kind = self.config["model_type"]
        return (
            f"stock {kind}"
            if self.code is None
            else f"{kind}, a class that ships with it (trust_remote_code=True)"
        )


def shape_of(arch: Arch, block: Block) -> Shape:
    """The units that a block has. One that lost all of a kind is stored with one of zeros: no format has empty matrices."""
    return Shape(*(max(1, units(block, arch.group(name))) for name in Shape._fields))


def _without_own(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("auto_map", "widths", "biases")}


def _stock_llama(config: Mapping[str, Any], kind: str, wanted: Any) -> dict[str, Any] | None:
    """The configuration as that of a stock LLaMA-family `kind` with the architecture `wanted` (llama.Config), or None."""
    if kind == "llama" and wanted.dim % wanted.query_heads:
        return None  # transformers refuses it, head_dim given or not
    new = _without_own(config) | {
        "model_type": kind,
        "architectures": [f"{NAMES[kind]}ForCausalLM"],
        "head_dim": wanted.head_dim,
    }
    new |= {
        "num_attention_heads": wanted.query_heads,
        "num_key_value_heads": wanted.kv_heads,
        "intermediate_size": wanted.ffn_dim,
    }
    # What the types have different defaults for.
    new |= {
        "rms_norm_eps": wanted.eps,
        "hidden_act": wanted.act,
        "tie_word_embeddings": wanted.tied,
    }
    if kind in ("llama", "granite"):
        new["attention_bias"] = bool({"q", "k", "v", "o"} & set(wanted.biases))
        new["mlp_bias"] = bool({"gate", "up", "down"} & set(wanted.biases))
    if kind == "granite":
        new |= hf.granite_identity(wanted.head_dim)
    if kind == "mistral":
        new["sliding_window"] = wanted.windows[0]
    read = hf.LLAMA.arch(new).config
    same = dataclasses.replace(read, biases=()) == dataclasses.replace(wanted, biases=())
    return new if same and set(wanted.biases) <= set(read.biases) else None


def _stock(config: Mapping[str, Any], shape: Shape, biases: Sequence[str]) -> Form | None:
    """The first stock form of blocks that all have this shape, or None."""
    own = hf.kind_of(config)
    if hf.family(config) is hf.OPT:
        new = _without_own(config) | {"model_type": own, "architectures": ["OPTForCausalLM"]}
        new |= {"ffn_dim": shape.neurons, "enable_bias": bool(biases)}
        return Form(new) if shape.heads == _all_heads(config) else None
    dense = hf.family(config).arch(config).config
    heads = {
        "kv_heads": shape.heads,
        "query_heads": shape.heads * (dense.query_heads // dense.kv_heads),
    }
    wanted = dataclasses.replace(
        dense, ffn_dim=shape.neurons, biases=tuple(biases), widths=(), **heads
    )
    first = [own] if shape.heads == dense.kv_heads else []
    for kind in dict.fromkeys([*first, "llama", "mistral", "granite", own]):
        if found := _stock_llama(config, kind, wanted):
            return Form(found)
    return None


def _all_heads(config: Mapping[str, Any]) -> int:
    """Units of heads that the configuration itself says, whatever its blocks have."""
    dense = hf.family(config).arch(config).config
    return dense.dim // dense.head_dim if hf.family(config) is hf.OPT else dense.kv_heads


def _of_our_own(config: Mapping[str, Any], shapes: Sequence[Shape], biases: Sequence[str]) -> Form:
    kind, family = hf.kind_of(config), hf.family(config)
    widths = {name: [getattr(s, name) for s in shapes] for name in Shape._fields}
    new = dict(config) | {
        "model_type": hf.OWN + kind,
        "architectures": ["PrunedForCausalLM"],
        "widths": widths,
    }
    new["biases"] = [name for slot, name in family.linears.items() if slot in biases]
    module = CODE.removesuffix(".py")
    new["auto_map"] = {
        "AutoConfig": f"{module}.PrunedConfig",
        "AutoModelForCausalLM": f"{module}.PrunedForCausalLM",
    }
    new[family.neurons] = max(s.neurons for s in shapes)
    base = "opt" if family is hf.OPT else "llama"
    text = (pathlib.Path(__file__).parent / "remote" / f"{base}.py").read_text(encoding="utf-8")
    code = text.replace(f"topiary_{base}", hf.OWN + kind).replace(NAMES[base], NAMES[kind])
    return Form(new, code)


def form(
    config: Mapping[str, Any], shapes: Sequence[Shape], biases: Sequence[str], layout: Layout
) -> Form:
    """How to write a model made from `config`.

    Args:
      shapes: of every block; biases: the slots that have one in any block.
      layout: "auto" the plainest form of these very shapes; "padded" a stock one, narrower blocks to be filled up with zeros.
    Raises InputError if "padded" is asked for and no stock architecture has these biases.
    """
    widest = Shape(*(max(column) for column in zip(*shapes, strict=True)))
    if layout == "padded" and hf.family(config) is hf.OPT:
        widest = widest._replace(
            heads=_all_heads(config)
        )  # a stock OPT model's heads make up its hidden size
    alike = layout == "padded" or all(s == widest for s in shapes)
    found = _stock(config, widest, biases) if alike else None
    if found is None and layout == "padded":
        raise InputError(
            f"--layout=padded: no stock architecture has {hf.kind_of(config)}'s sliding window with biases: leave --layout out, or "
            "choose a method that adds none, such as flap(bias=False)"
        )
    return found or _of_our_own(config, shapes, biases)


def preview(config: Mapping[str, Any], leaves: ShapeChange, layout: Layout) -> str:
    """What the result of a method will load as, said before the work begins. Raises InputError as `form` does."""
    arch, _, blocks = hf.specs(config)
    readers = {arch.group(name).reader.name for name in leaves.narrower} if leaves.biased else set()
    biases, shapes = tuple({*arch.config.biases, *readers}), [shape_of(arch, b) for b in blocks]
    label = form(config, shapes, biases, layout).label
    fewer_heads = "heads" in leaves.narrower
    if layout == "padded" or not leaves.narrower or (leaves.alike and not fewer_heads):
        return label
    if not leaves.alike or hf.family(config) is hf.OPT:
        return _of_our_own(config, shapes, biases).label
    return f"{label}, or another stock type of the same function where the heads left do not divide the hidden size"


def finished(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with the stored type, and its rotary base in both spellings.

    transformers 4 reads `torch_dtype` and `rope_theta`, 5 `dtype` and `rope_parameters`: both are written where they apply.
    """
    new = {**config, "torch_dtype": dtype, "dtype": dtype}
    if rope := config.get("rope_parameters"):
        new["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        if rope.get("rope_type", "default") != "default":
            new["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return new
