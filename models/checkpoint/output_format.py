"""Choice of the configuration that a pruned model is written under: the plainest that holds it.

First choice is the model's own type. Next are stock `llama`, `mistral` (any number of heads, no
biases) and `granite` (both, with multipliers that multiply by one), which compute the same
function. Last is a small class that ships with the checkpoint, for blocks that differ in width. A
stock form is chosen only if reading it back gives the intended architecture, so no field is
silently ignored.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from models.arch import Arch, Block, experts_of
from models.checkpoint.own_code import CODE, own_code
from models.errors import InputError
from models.families import hf
from models.families.fields import OWN, kind_of
from models.families.llama import granite_identity
from models.surgery import units

Layout = Literal["auto", "padded"]
# Types that may hold a model of another one, plainest first.
PORTABLE = ("llama", "mistral", "granite")
# Version of transformers whose layout of config.json we write, beside that of transformers 4.
LAYOUT_OF = "5.0.0"


class Shape(NamedTuple):
    """Units of a block's coupled groups.

    Attributes:
      heads: Attention heads; key-value heads with grouped-query attention.
      neurons: Neurons of the feed-forward part, or of each expert.
      experts: Experts, 0 in a block without any.
    """

    heads: int
    neurons: int
    experts: int = 0


class ShapeChange(NamedTuple):
    """Change of shapes by a method, as far as it is known before the run.

    Attributes:
      narrower: Groups that lose units.
      alike: True if every block loses as many units.
      biased: True if the readers of these groups get biases.
      shallower: True if whole blocks are left out.
      hidden: Channels that the residual stream keeps, where it loses some; else 0.
      shapes: Units of each block after the run, where they are known; else empty.
    """

    narrower: tuple[str, ...] = ()
    alike: bool = True
    biased: bool = False
    shallower: bool = False
    hidden: int = 0
    shapes: tuple[Shape, ...] = ()


class Form(NamedTuple):
    """Configuration and code that a model is written under.

    Attributes:
      config: Contents of `config.json`.
      code: Source of the class that ships with the checkpoint. None for a stock form, whose blocks
        have the widths of the configuration, so narrower ones must be padded.
    """

    config: dict[str, Any]
    code: str | None = None

    @property
    def label(self) -> str:
        """Return what the checkpoint loads as, for people."""
        kind = self.config["model_type"]
        if self.code is None:
            return f"stock {kind}"
        return f"{kind}, a class that ships with it (trust_remote_code=True)"


def shape_of(arch: Arch, block: Block) -> Shape:
    """Count the units of a block as they are stored.

    Args:
      arch: Architecture.
      block: Parameters or specs of the block.

    Returns:
      Units, at least one of each kind: no format has empty matrices, so a block that lost all
      units is stored with one of zeros.

    Raises:
      ValueError: Experts of the block differ in width.
    """
    neurons = {units(block, group) for group in arch.groups_of(block, "neurons")}
    if len(neurons) > 1:
        raise ValueError("experts of a block differ in width, which no format stores")
    return Shape(
        heads=max(1, units(block, arch.group("heads"))),
        neurons=max(1, *neurons),
        experts=experts_of(block),
    )


def _without_own_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("widths", "biases")}


def _stock_config(config: Mapping[str, Any], kind: str, target: Any) -> dict[str, Any] | None:
    """Return the configuration of stock `kind` with the architecture `target`, or None."""
    family, own = hf.FAMILIES[kind], kind_of(config)
    if not family.can_hold(target):
        return None
    new = _without_own_fields(config) | {
        "model_type": kind,
        "architectures": [family.model_class],
        "head_dim": target.head_dim,
        "num_attention_heads": target.query_heads,
        "num_key_value_heads": target.kv_heads,
        family.neurons: target.ffn_dim,
        **_expert_fields(family, target.experts, target.expert_neurons),
    }
    if kind in PORTABLE or own == "qwen2":
        # The defaults of these differ between the types.
        new["rms_norm_eps"] = target.static.eps
        new["hidden_act"] = target.act
        new["tie_word_embeddings"] = target.tied
    for flag, slots in family.bias_flags.items():
        new[flag] = bool(set(slots) & set(target.biases))
    if kind == "granite" and own != "granite":
        new |= granite_identity(target.head_dim)
    if kind == "mistral":
        # Its default is a window of 4096, so full attention needs an explicit null.
        new["sliding_window"] = target.windows[0]
    # Read it back: the type may not know a field, such as the windows.
    actual = family.arch(new).config
    same = dataclasses.replace(actual, biases=()) == dataclasses.replace(target, biases=())
    # More biases than needed are filled with zeros.
    return new if same and set(target.biases) <= set(actual.biases) else None


def _expert_fields(family: hf.Family, experts: int, neurons: int) -> dict[str, int]:
    """Return the fields that say how many experts there are and how wide; none without experts."""
    if not experts:
        return {}
    return {**dict.fromkeys(family.experts, experts), family.expert_neurons: neurons}


def _widest(config: Mapping[str, Any], shapes: Sequence[Shape]) -> tuple[Shape, Shape]:
    """Return the widest shape of the blocks without experts, and of those with experts.

    Where there are none of a kind, it has the width of the configuration.
    """
    heads = max(s.heads for s in shapes)
    neurons = [s.neurons for s in shapes if not s.experts]
    own_neurons = config.get(hf.family(config).neurons, 0)
    of_experts = [(s.experts, s.neurons) for s in shapes if s.experts]
    experts, expert_neurons = max(of_experts, default=(0, 0))
    if of_experts and not neurons and hf.family(config).expert_neurons == hf.family(config).neurons:
        own_neurons = expert_neurons
    dense = Shape(heads, max(neurons, default=own_neurons))
    return dense, Shape(heads, expert_neurons, experts)


def _stock_form(
    config: Mapping[str, Any], shape: Shape, with_experts: Shape, biases: Sequence[str]
) -> Form | None:
    """Return the first stock form of blocks that have one of these shapes, or None."""
    own, family = kind_of(config), hf.family(config)
    if _has_fixed_heads(config):
        new = _without_own_fields(config) | {
            "model_type": own,
            "architectures": [family.model_class],
            family.neurons: shape.neurons,
            **{flag: bool(biases) for flag in family.bias_flags},
        }
        return Form(new) if shape.heads == _dense_heads(config) else None
    dense = family.arch(config).config
    target = dataclasses.replace(
        dense,
        ffn_dim=shape.neurons,
        kv_heads=shape.heads,
        # A key-value head keeps all the query heads that share it.
        query_heads=shape.heads * (dense.query_heads // dense.kv_heads),
        biases=tuple(biases),
        widths=(),
        experts=with_experts.experts,
        expert_neurons=with_experts.neurons,
    )
    preferred = [own] if shape.heads == dense.kv_heads else []
    # Only types that give the tensors the same names.
    portable = [k for k in PORTABLE if hf.FAMILIES[k].linears == family.linears]
    for kind in dict.fromkeys([*preferred, *portable, own]):
        stock = _stock_config(config, kind, target)
        if stock is not None:
            return Form(stock)
    return None


def _has_fixed_heads(config: Mapping[str, Any]) -> bool:
    """Return True for OPT, the heads of whose stock models make up the hidden size."""
    return hf.family(config) is hf.OPT


def _dense_heads(config: Mapping[str, Any]) -> int:
    """Return the head units of the configuration itself, whatever its blocks have."""
    dense = hf.family(config).arch(config).config
    return dense.dim // dense.head_dim if _has_fixed_heads(config) else dense.kv_heads


def _own_form(config: Mapping[str, Any], shapes: Sequence[Shape], biases: Sequence[str]) -> Form:
    """Return the form of our own type, whose class ships with the checkpoint."""
    kind, family = kind_of(config), hf.family(config)
    widest, with_experts = _widest(config, shapes)
    # The names that `auto_map` gives are those of the classes in remote/.
    module = CODE.removesuffix(".py")
    new = dict(config) | {
        "model_type": OWN + kind,
        "architectures": ["PrunedForCausalLM"],
        "widths": {
            "heads": [s.heads for s in shapes],
            "neurons": [s.neurons for s in shapes],
        },
        "biases": [name for slot, name in family.linears.items() if slot in biases],
        "auto_map": {
            "AutoConfig": f"{module}.PrunedConfig",
            "AutoModelForCausalLM": f"{module}.PrunedForCausalLM",
        },
        family.neurons: widest.neurons,
        **_expert_fields(family, with_experts.experts, with_experts.neurons),
    }
    return Form(new, own_code(new))


def _travels(field: str) -> bool:
    """Return whether a field of the source's configuration holds for a pruned model.

    Fields that name code do not: the code stays behind, and some would fetch it from the hub.
    """
    return field not in ("auto_map", "custom_pipelines") and "_implementation" not in field


def _portable(form: Form, source: Mapping[str, Any]) -> Form:
    """Leave out of a form what the source says of its own code and of who wrote it."""
    new = dict(form.config)
    # transformers mends tokenizers of mistral models that a version before 5 wrote, which ours are
    # not. A mistral model keeps what it says: its tokenizer is the one that may need it.
    if kind_of(source) != "mistral" or new["model_type"] != "mistral":
        new.pop("transformers_version", None)
        if new["model_type"] == "mistral":
            new["transformers_version"] = LAYOUT_OF
    return form._replace(config=new)


def choose_form(
    config: Mapping[str, Any], shapes: Sequence[Shape], biases: Sequence[str], layout: Layout
) -> Form:
    """Choose the form that a model made from `config` is written under.

    Args:
      config: Contents of the dense model's `config.json`.
      shapes: Units of each block.
      biases: Slots that have a bias in any block.
      layout: "auto" for the plainest form of these shapes; "padded" for a stock form, whose
        narrower blocks are filled up with zeros.

    Returns:
      Form.

    Raises:
      InputError: The layout is "padded" and no stock architecture has these biases.
    """
    source, config = config, {k: v for k, v in config.items() if _travels(k)}
    # A stock form has one width for all blocks of a kind: that of the widest.
    widest, with_experts = _widest(config, shapes)
    if layout == "padded" and _has_fixed_heads(config):
        # The heads of a stock OPT model make up its hidden size.
        widest = widest._replace(heads=_dense_heads(config))
    alike = layout == "padded" or all(s in (widest, with_experts) for s in shapes)
    stock = _stock_form(config, widest, with_experts, biases) if alike else None
    if stock is None and layout == "padded":
        raise InputError(
            "asks for a stock architecture, and none has "
            f"{kind_of(config)}'s sliding window with biases",
            "leave `layout` out, or choose a method that adds none, such as flap(bias=False)",
            field="layout",
            value="padded",
        )
    return _portable(stock or _own_form(config, shapes, biases), source)


def preview(config: Mapping[str, Any], change: ShapeChange, layout: Layout) -> str:
    """Describe what a method's result will load as, before the run.

    Args:
      config: Contents of the dense model's `config.json`.
      change: Change of shapes by the method.
      layout: As in `choose_form`.

    Returns:
      Label for people.

    Raises:
      InputError: As in `choose_form`.
    """
    arch, _, blocks = hf.specs(config)
    readers = {
        group.reader.name
        for group in arch.groups
        if change.biased and group.name in change.narrower
    }
    biases = tuple({*arch.config.biases, *readers})
    if change.hidden:
        form = choose_form(hf.narrower(config, change.hidden), change.shapes, biases, layout)
        if form.code is None:
            return form.label
        raise InputError(
            f"no stock type of transformers holds {change.hidden} channels with the heads left",
            "remove the same share of heads as of channels, or leave the channels whole",
        )
    shapes = [shape_of(arch, b) for b in blocks]
    # The final widths are not known yet; the dense ones stand for any that are all alike.
    form = choose_form(config, shapes, biases, layout)
    keeps_heads = change.alike and "heads" not in change.narrower
    # Blocks that differ before the run differ after it.
    if layout == "padded" or not change.narrower or keeps_heads or form.code is not None:
        return form.label
    if not change.alike or _has_fixed_heads(config):
        return _own_form(config, shapes, biases).label
    return (
        f"{form.label}, or another stock type of the same function where the heads left do not "
        "divide the hidden size"
    )
