"""Continue a text with a dense or pruned model.

python -m launch.generate --model=DIR --prompt="Once there was" --new_tokens=64
"""

import json
import sys
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from calibration.tokenizer import TextTokenizer, load_tokenizer
from launch.flags.cli import Flags, run
from launch.flags.common import mesh_of, model_flags, open_model
from models.arch import Model
from models.checkpoint.reader import Checkpoint
from models.errors import InputError
from models.generate import generate
from models.sharding import place


def options() -> Flags:
    """The flags of `launch.generate`."""
    f = Flags("launch.generate", __doc__ or "")
    model_flags(f)
    f.group("Text")
    f.string("prompt", None, "the text to continue")
    f.integer("new_tokens", 64, "most tokens to add; a text also ends where the model ends it", 1)
    f.number(
        "temperature", 0.0, "0: the most likely token; above: drawn, the more freely the higher"
    )
    f.number("top_p", 1.0, "draw from the most likely tokens that together have this probability")
    f.integer("seed", 0, "of the draws")
    return f


def ends_of(checkpoint: Checkpoint) -> list[int]:
    """The tokens that end a text, from `generation_config.json`, else `config.json`; may be none."""
    file = checkpoint.directory / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = settings.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    return [] if found is None else np.atleast_1d(found).tolist()


def prompt_tokens(tokenizer: TextTokenizer, prompt: str, checkpoint: Checkpoint) -> list[int]:
    """The tokens of a prompt, with what the tokenizer puts around a text; InputError without any, or for a model of other tokens."""
    ids, vocab = tokenizer(prompt, special=True), checkpoint.model.arch.config.vocab
    if not ids:
        raise InputError("--prompt has no tokens: give a text to continue")
    if max(ids) >= vocab:
        raise InputError(
            f"--prompt has token {max(ids)}, the model has {vocab}: use this model's own tokenizer"
        )
    return ids


def continuation(
    tokenizer: TextTokenizer, prompt: list[int], new: np.ndarray, non_block: list[int]
) -> str:
    """The text of new tokens int [t] after the prompt's, up to the first that ends it."""
    stops = np.flatnonzero(np.isin(new, non_block))
    return tokenizer.continuation(prompt, new[: stops[0] if stops.size else None].tolist())


def check(values: dict[str, Any]) -> None:
    """InputError for a missing prompt, or a temperature or nucleus out of range."""
    if not values["prompt"]:
        raise InputError("--prompt is missing: give the text to continue")
    if not 0 <= values["temperature"] < float("inf"):
        raise InputError(f"--temperature={values['temperature']} must be 0 or more")
    if not 0 < values["top_p"] <= 1:
        raise InputError(f"--top_p={values['top_p']} must be above 0 and at most 1")


def main(values: dict[str, Any]) -> None:
    """Print the prompt and what the model adds to it."""
    check(values)
    mesh, checkpoint = mesh_of(values["mesh"], 1), open_model(values["model"], values["dtype"])
    tokenizer, new_tokens = load_tokenizer(checkpoint.directory), values["new_tokens"]
    prompt = prompt_tokens(tokenizer, values["prompt"], checkpoint)
    positions = getattr(checkpoint.model.arch.config, "positions", None)
    if positions is not None and len(prompt) + new_tokens > positions:
        raise InputError(
            f"{len(prompt)} tokens of --prompt and --new_tokens={new_tokens} are more than the model's {positions} positions"
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
        eos=ends_of(checkpoint),
    )
    text = continuation(tokenizer, prompt, new[0], ends_of(checkpoint))
    Console().print(Text.assemble((values["prompt"], "bold"), text), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run(options(), main))
