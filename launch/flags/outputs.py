"""Flags of the files that a run writes."""

from launch.flags.cli import Flags
from launch.run.export import CHECKS


def output_flags(f: Flags) -> None:
    """Define --layout, --output_format, --gguf_type, --pack and --check.

    Args:
      f: The command's flags.
    """
    f.choice(
        "layout",
        "auto",
        ("auto", "padded"),
        "blocks of different widths: auto ships a model class with the checkpoint, padded fills "
        "them with zeros to a stock architecture",
    )
    f.choice(
        "output_format",
        "hf",
        ("hf", "orbax", "gguf"),
        "beside the Hugging Face files: orbax writes the pytrees to OUTPUT/orbax, gguf a file for "
        "llama.cpp",
    )
    f.choice("gguf_type", "f16", ("f16", "q8_0"), "type of the matrices in the .gguf file")
    f.choice(
        "pack",
        "none",
        ("none", "bitmask", "macko"),
        "also writes the weights without their zeros to OUTPUT/packed: bitmask for fewer bytes, "
        "macko for MACKO's GPU kernels",
    )
    f.choice(
        "check",
        "transformers",
        CHECKS,
        "how the written checkpoint is loaded back and its logits compared: transformers asks it "
        "too, where PyTorch is installed; topiary loads it here alone; none compares nothing",
    )
