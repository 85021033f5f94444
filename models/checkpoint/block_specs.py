"""Specs of a block as it is written: with the experts and biases that it has."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.arch import Block, Slot, experts_of, linear_of, with_linears
from models.checkpoint.fused import stored_name
from models.families import hf
from models.layers import Linear
from models.surgery import first_experts


def specs_of(config: Mapping[str, Any], specs: Block, i: int, experts: int) -> Block:
    """Return the specs of the i-th block that is written.

    Args:
      config: Contents of the dense model's `config.json`.
      specs: Specs of the dense model's block of that number.
      i: Number of the block among those that are written.
      experts: Experts that the block has.
    """
    # Where blocks were left out, another one had this number, maybe with experts, maybe without.
    if bool(experts_of(specs)) != bool(experts):
        specs = hf.block_of_kind(config, i, bool(experts))
    # Experts that are left have the first numbers.
    return first_experts(specs, experts)


def linear_weights(config: Mapping[str, Any]) -> list[str]:
    """Return the stored names of the matrices of the blocks' linears, in the model's order.

    Args:
      config: Contents of `config.json`.
    """
    arch, _, blocks = hf.specs(config)
    names = (hf.linear_name(b, s.name) for b in blocks for s in arch.slots_of(b))
    # Parts of a fused tensor have one stored name.
    return list(dict.fromkeys(f"{stored_name(name)}.weight" for name in names))


def bias_name(spec: Any) -> str:
    """Return the name of a linear's bias, present or not."""
    return spec.w.name.removesuffix("weight") + "bias"


def with_biases(specs: Block, block: Block, slots: Sequence[Slot]) -> Block:
    """Give the specs the biases that the block has.

    Args:
      specs: Specs of the dense block.
      block: Parameters of the block that is written.
      slots: Slots of the block.

    Raises:
      ValueError: The block lost a bias.
    """
    linears = {}
    for slot in slots:
        spec, b = linear_of(specs, slot.name), linear_of(block, slot.name).b
        if b is None and spec.b is not None:
            raise ValueError(f"{spec.b.name} was lost")
        bias: Any = None if b is None else hf.Spec(bias_name(spec), b.shape)
        linears[slot.name] = Linear(spec.w, bias)
    return with_linears(specs, linears)
