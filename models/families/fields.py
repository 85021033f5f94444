"""Checked reading of `config.json`: every error names the field that is wrong."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from models.errors import InputError
from models.layers import ACTIVATIONS, Rope
from models.untrusted import LARGEST, MOST, MOST_BLOCKS, is_count, shown

ROPE_KINDS = ("default", "linear", "dynamic", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")
# Sliding window of Mistral and Qwen2 where the file leaves it out.
DEFAULT_WINDOW = 4096
# Prefix of the model_type of a checkpoint whose blocks differ in width; its stock type follows.
OWN = "topiary_"
REPAIR = "mend the file or fetch the checkpoint again"
# Counts that something is built for, one for each, before the weights are looked at.
_MOST = {"num_hidden_layers": MOST_BLOCKS}


class Fields:
    """Checked reader of the fields of a configuration.

    Args:
      config: Contents of `config.json`, or of one of its sections.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Read an integer.

        Args:
          name: Field.
          default: Value of an absent or null field; None if the field is required.
          least: Smallest value allowed.

        Returns:
          Value of the field.

        Raises:
          InputError: The field is required and absent, no integer, too small or too large.
        """
        value, most = self.config.get(name), _MOST.get(name, MOST)
        value = default if value is None else value
        if value is None or not is_count(value, least, most):
            raise InputError(
                f"config.json: {name} must be an integer from {least} to {most}, not "
                f"{shown(value)}",
                REPAIR,
            )
        return value

    def number(self, name: str, default: float) -> float:
        """Read a positive number that is finite in float32.

        Args:
          name: Field.
          default: Value of an absent field.

        Returns:
          Value of the field.

        Raises:
          InputError: The field is no positive, finite number.
        """
        value = self.config.get(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= LARGEST:
            raise InputError(
                f"config.json: {name} must be a positive number, not {shown(value)}", REPAIR
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Read a boolean.

        Args:
          name: Field.
          default: Value of an absent or null field.

        Returns:
          Value of the field.

        Raises:
          InputError: The field is no boolean.
        """
        value = self.config.get(name)
        value = default if value is None else value
        # 0 and 1 are refused: they hint at a damaged or hand-written file.
        if not isinstance(value, bool):
            raise InputError(
                f"config.json: {name} must be true or false, not {shown(value)}", REPAIR
            )
        return value

    def act(self, name: str, default: str) -> str:
        """Read the name of an activation function.

        Args:
          name: Field.
          default: Value of an absent field.

        Returns:
          Key of `models.layers.ACTIVATIONS`.

        Raises:
          InputError: The activation is not supported.
        """
        value = self.config.get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise InputError(
                f"config.json: {name}={shown(value)} is not supported", f"it must be one of {known}"
            )
        return value

    def section(self, name: str) -> Mapping[str, Any]:
        """Read a JSON object.

        Args:
          name: Field.

        Returns:
          Value of the field, empty when it is absent or null.

        Raises:
          InputError: The field is no object.
        """
        value = self.config.get(name) or {}
        if not isinstance(value, Mapping):
            raise InputError(f"config.json: {name} must be an object, not {shown(value)}", REPAIR)
        return value


def longest_text(config: Mapping[str, Any], default: int) -> int:
    """Return the most tokens of a text that a model is made for.

    Args:
      config: Contents of `config.json`.
      default: Value of an absent field.

    Raises:
      InputError: The field is no positive integer; transformers takes no null there either.
    """
    if config.get("max_position_embeddings", default) is None:
        raise InputError(
            "config.json: max_position_embeddings is null",
            "give the longest text that the model is made for, or leave the field out",
        )
    return Fields(config).count("max_position_embeddings", default)


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the stock `model_type` that a configuration has or is made from.

    Args:
      config: Contents of `config.json`.
    """
    return str(config["model_type"]).removeprefix(OWN)


def read_rope(f: Fields) -> Rope:
    """Read the rotary settings.

    Both spellings are known: `rope_theta` with `rope_scaling` (transformers 4) and
    `rope_parameters` (transformers 5).

    Args:
      f: Reader of the configuration.

    Returns:
      Rotary settings.

    Raises:
      InputError: The kind of scaling is not supported, a field is wrong, or both spellings are
        there and say different things.
    """
    spellings = [f.section(name) for name in ("rope_parameters", "rope_scaling")]
    given = [_rope(f, section) for section in spellings if section]
    if len(set(given)) > 1:
        raise InputError(
            "config.json: rope_parameters and rope_scaling disagree",
            "leave out the one that is wrong: versions of transformers read one or the other",
        )
    return given[0] if given else _rope(f, {})


def _rope(f: Fields, parameters: Mapping[str, Any]) -> Rope:
    """Read the rotary settings of one spelling; see `read_rope`."""
    g = Fields(parameters)
    # Older files call it `type`. transformers takes an absent kind as the default, but no null.
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise InputError(
            f"config.json: rope type {shown(kind)} is not supported",
            f"it must be one of {', '.join(ROPE_KINDS)}",
        )
    if g.number("partial_rotary_factor", f.number("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError("config.json: partial_rotary_factor other than 1 is not supported")
    longest = f.count("max_position_embeddings", 2048)
    low, high = g.number("low_freq_factor", 1.0), g.number("high_freq_factor", 4.0)
    if low >= high:
        raise InputError(
            f"config.json: low_freq_factor={low} must be less than high_freq_factor={high}", REPAIR
        )
    # Only llama3 scales from another length than the model's longest text.
    original = g.count("original_max_position_embeddings", longest) if kind == "llama3" else longest
    return Rope(
        theta=g.number("rope_theta", f.number("rope_theta", 10000.0)),
        kind=kind,
        factor=g.number("factor", 1.0),
        max_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def read_windows(f: Fields, kind: str, blocks: int) -> tuple[int | None, ...]:
    """Read the sliding window of each block.

    Args:
      f: Reader of the configuration.
      kind: Stock `model_type`.
      blocks: Number of blocks.

    Returns:
      Window of each block in positions, None for full attention.

    Raises:
      InputError: A field is wrong.
    """
    # Mistral has a window unless it is null; Qwen2 has one only if it says so.
    sliding = kind == "mistral" or (kind == "qwen2" and f.flag("use_sliding_window", False))
    if not sliding or f.config.get("sliding_window", DEFAULT_WINDOW) is None:
        return (None,) * blocks
    window = f.count("sliding_window", DEFAULT_WINDOW)
    if kind == "mistral":
        return (window,) * blocks
    # Qwen2's first blocks see everything, and `layer_types` overrides that rule.
    full = f.count("max_window_layers", 28, least=0)
    kinds = f.config.get("layer_types") or [
        "full_attention" if i < full else "sliding_attention" for i in range(blocks)
    ]
    is_list = isinstance(kinds, list) and len(kinds) == blocks
    if not is_list or any(k not in LAYER_TYPES for k in kinds):
        raise InputError(
            f"config.json: layer_types must be a list of {blocks} words out of "
            f"{', '.join(LAYER_TYPES)}",
            REPAIR,
        )
    return tuple(window if k == "sliding_attention" else None for k in kinds)


def _has_own_type(f: Fields) -> bool:
    return str(f.config["model_type"]).startswith(OWN)


def _are_widths(value: Any, blocks: int) -> TypeGuard[list[int]]:
    """Return True for a list of one positive integer for each block."""
    if not isinstance(value, list) or len(value) != blocks:
        return False
    return all(is_count(n) for n in value)


def read_widths(f: Fields) -> tuple[tuple[int, int], ...]:
    """Read the head units and neurons of each block of a model of our own type.

    Args:
      f: Reader of the configuration.

    Returns:
      Head units and neurons of each block; empty for a stock model.

    Raises:
      InputError: `widths` has no positive integer for each block.
    """
    if not _has_own_type(f):
        return ()
    blocks = f.count("num_hidden_layers")
    heads, neurons = f.section("widths").get("heads"), f.section("widths").get("neurons")
    if not _are_widths(heads, blocks) or not _are_widths(neurons, blocks):
        raise InputError(
            f"config.json: widths must have {blocks} positive integers for heads and as many for "
            "neurons",
            REPAIR,
        )
    return tuple(zip(heads, neurons, strict=True))


def read_biases(f: Fields, linears: Mapping[str, str], stock: tuple[str, ...]) -> tuple[str, ...]:
    """Read the slots that have a bias.

    Args:
      f: Reader of the configuration.
      linears: Checkpoint name of each slot's module within a block.
      stock: Slots that have a bias in the stock model.

    Returns:
      Slots that a model of our own type lists by module name, else `stock`.

    Raises:
      InputError: `biases` is no list of known modules.
    """
    if not _has_own_type(f):
        return stock
    listed, known = f.config.get("biases"), tuple(linears.values())
    # A tuple rather than a set: not every JSON value can be hashed.
    if not isinstance(listed, list) or not all(name in known for name in listed):
        raise InputError(
            f"config.json: biases must be a list of words out of {', '.join(known)}",
            REPAIR,
        )
    return tuple(slot for slot, name in linears.items() if name in listed)


def granite_identity(head_dim: int) -> dict[str, float]:
    """Return the multipliers with which a granite model computes what a LLaMA model does.

    Args:
      head_dim: Size of a head.
    """
    ones = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    return dict.fromkeys(ones, 1.0) | {"attention_multiplier": head_dim**-0.5}


def check_granite(f: Fields, head_dim: int) -> None:
    """Check that the multipliers of a granite model make it a LLaMA model.

    Args:
      f: Reader of the configuration.
      head_dim: Size of a head.

    Raises:
      InputError: A multiplier has another value.
    """
    for name, value in granite_identity(head_dim).items():
        # Relative, because configurations round h ** -0.5 to a few digits.
        if abs(f.number(name, 1.0) - value) > 1e-6 * value:
            raise InputError(
                f"config.json: a granite model with {name}={f.number(name, 1.0)} is not supported, "
                f"only with {value:g}"
            )
