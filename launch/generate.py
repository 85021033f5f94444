"""Continue a text with a dense or pruned model.

python -m launch.generate --model=DIR --prompt="Once there was" --new_tokens=64
"""

import sys
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from calibration.special_tokens import special_tokens
from calibration.tokenizer import TextTokenizer, load_tokenizer
from launch.flags.cli import Flags, run
from launch.flags.common import mesh_of, model_flags, open_model
from models.arch import Model
from models.checkpoint.reader import Checkpoint
from models.errors import InputError
from models.generate import generate
from models.sharding import place


def options() -> Flags:
    """Define the flags of `launch.generate`."""
    f = Flags("launch.generate", __doc__ or "")
    model_flags(f)
    f.group("Text")
    f.string("prompt", None, "the text to continue")
    f.integer("new_tokens", 64, "most tokens to add; the model may end the text earlier", 1)
    f.number("temperature", 0.0, "0 for the most likely token; higher values are more random")
    f.number("top_p", 1.0, "sample from the most likely tokens with this total probability")
    f.integer("seed", 0, "seed of the sampling")
    return f


def eos_tokens(checkpoint: Checkpoint) -> list[int]:
    """Return the tokens that end a text; empty if the checkpoint names none.

    Args:
      checkpoint: The model.

    Raises:
      InputError: A file cannot be read, or names something else than tokens.
    """
    return special_tokens(checkpoint, "eos")


def prompt_tokens(tokenizer: TextTokenizer, prompt: str, checkpoint: Checkpoint) -> list[int]:
    """Tokenize a prompt, with the special tokens that the tokenizer adds to a text.

    Args:
      tokenizer: The checkpoint's tokenizer.
      prompt: The text.
      checkpoint: The model that reads the tokens.

    Raises:
      InputError: There are no tokens, or one is outside the model's vocabulary.
    """
    ids, vocab = tokenizer(prompt, special=True), checkpoint.model.arch.config.vocab
    if not ids:
        raise InputError("has no tokens", "give a text to continue", field="prompt")
    if max(ids) >= vocab:
        raise InputError(
            f"has token {max(ids)}, but the model's vocabulary has {vocab} tokens",
            "use this model's own tokenizer",
            field="prompt",
        )
    return ids


def continuation(
    tokenizer: TextTokenizer, prompt: list[int], new: np.ndarray, eos: list[int]
) -> str:
    """Return the text of new tokens up to the first that ends it.

    Args:
      tokenizer: The tokenizer of the model.
      prompt: Tokens before the new ones.
      new: New tokens, int [time].
      eos: Tokens that end a text.
    """
    stops = np.flatnonzero(np.isin(new, eos))
    return tokenizer.continuation(prompt, new[: stops[0] if stops.size else None].tolist())


def check(values: dict[str, Any]) -> None:
    """Check the prompt and the sampling.

    Args:
      values: Values of the flags.

    Raises:
      InputError: The prompt is missing, or the temperature or top_p is out of range.
    """
    if not values["prompt"]:
        raise InputError("is missing", "give the text to continue", field="prompt")
    for name, valid, reason in (
        ("temperature", 0 <= values["temperature"] < float("inf"), "must be 0 or more"),
        ("top_p", 0 < values["top_p"] <= 1, "must be above 0 and at most 1"),
    ):
        if not valid:
            raise InputError(reason, field=name, value=values[name])


def main(values: dict[str, Any]) -> None:
    """Print the prompt and its continuation."""
    check(values)
    mesh = mesh_of(values["mesh"], 1)
    checkpoint = open_model(values["model"], values["dtype"], values["revision"])
    tokenizer, new_tokens = load_tokenizer(checkpoint.directory), values["new_tokens"]
    prompt = prompt_tokens(tokenizer, values["prompt"], checkpoint)
    positions = getattr(checkpoint.model.arch.config, "positions", None)
    if positions is not None and len(prompt) + new_tokens > positions:
        raise InputError(
            f"after {len(prompt)} tokens of `prompt` exceeds the model's {positions} positions",
            "give a smaller number",
            field="new_tokens",
            value=new_tokens,
        )
    arch, non_block, blocks = checkpoint.model
    model = Model(arch, place(non_block, mesh), tuple(place(b, mesh) for b in blocks))
    new = generate(
        model,
        np.asarray([prompt]),
        new_tokens,
        temperature=values["temperature"],
        top_p=values["top_p"],
        key=jax.random.key(values["seed"]),
        eos=eos_tokens(checkpoint),
    )
    text = continuation(tokenizer, prompt, new[0], eos_tokens(checkpoint))
    Console().print(Text.assemble((values["prompt"], "bold"), text), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run(options(), main))
