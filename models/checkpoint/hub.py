"""Resolution of a model's name: a directory, a `.gguf` file, an embedded model, a hub id."""

import fnmatch
import functools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TypeVar

from models.checkpoint.companions import is_companion
from models.checkpoint.hub_client import snapshot
from models.checkpoint.hub_errors import Repository
from models.errors import InputError
from models.untrusted import user_path

EMBEDDED = pathlib.Path(__file__).parents[1] / "embedded"
# Small files beside the weights, besides those that travel: settings, tokenizers, the card.
FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")
# Patterns of weights by preference; only one format is downloaded.
WEIGHTS = ("model*.safetensors", "flax_model*.msgpack", "pytorch_model*.bin")
ADAPTER = "adapter_model.safetensors"

# An id of the hub, whose parts have at most 96 characters, and a commit, tag or branch behind it.
HUB_ID = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})(?:@(\S+))?")
Name = TypeVar("Name", str, str | None)


def resolve(name: str, weights: bool = True, adapters: bool = False) -> pathlib.Path:
    """Find a model, downloading it from the Hugging Face hub if needed.

    Args:
      name: Directory, `.gguf` file, "embedded:NAME", or hub id "owner/name" or
        "owner/name@revision".
      weights: True to download the weights of a hub id; False for its `config.json` alone.
      adapters: True to take a hub id of a LoRA adapter, too.

    Returns:
      Local directory or `.gguf` file.

    Raises:
      InputError: No such model is known, or the hub cannot deliver it.
    """
    if name.startswith("embedded:"):
        known = embedded_models()
        if name not in known:
            raise InputError(
                "is no embedded model", f"there are {', '.join(known)}", field="model", value=name
            )
        return known[name]
    path = user_path(name, "model")
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise InputError(
            "is neither a directory nor a .gguf file",
            "name a Hugging Face checkpoint directory or a .gguf file",
            field="model",
            value=name,
        )
    match = HUB_ID.fullmatch(name)
    # "./x" is meant as a path.
    if not match or name.startswith("."):
        raise InputError(
            "is no such directory or file, and not a hub id (owner/name)",
            "check the spelling",
            field="model",
            value=name,
        )
    repository = Repository(match[1], match[2], "model", "model", name)
    return snapshot(repository, functools.partial(_choose, name, weights, adapters))


def embedded_models() -> dict[str, pathlib.Path]:
    """Return the directory of every model that ships with the project, by its name."""
    return {f"embedded:{p.name}": p for p in sorted(EMBEDDED.iterdir()) if p.is_dir()}


def is_embedded(path: pathlib.Path) -> bool:
    """Return True if a directory is that of a model that ships with the project.

    Args:
      path: The directory, as `resolve` returns it.
    """
    return path.resolve().parent == EMBEDDED.resolve()


def at_revision(name: Name, revision: str) -> Name:
    """Return a model's name with its revision.

    Args:
      name: As for `resolve`; None if none is given.
      revision: A commit, tag or branch of the hub; empty for the name as it is.

    Raises:
      InputError: The name is not a hub id, or has another revision already.
    """
    if not revision or name is None:
        return name
    match = HUB_ID.fullmatch(name)
    if not match or name.startswith(".") or os.path.exists(os.path.expanduser(name)):
        raise InputError(
            "names a revision of the hub, and `model` is not on the hub",
            "leave it out",
            field="revision",
            value=revision,
        )
    if match[2] not in (None, revision):
        raise InputError(
            f"contradicts `model`={name}", "give one of them", field="revision", value=revision
        )
    return f"{match[1]}@{revision}"


def _choose(name: str, weights: bool, adapters: bool, files: Sequence[str]) -> list[str]:
    """Choose the files of a repository to download, with the weights in one format alone.

    Raises:
      InputError: There are no weights in a known format, or there is no configuration.
    """
    if not weights:
        if "config.json" in files:
            return ["config.json"]
        raise InputError("has no config.json", "choose another", field="model", value=name)
    # Folders of a repository hold other formats, such as ONNX.
    names = [file for file in files if "/" not in file]
    for pattern in (*WEIGHTS, ADAPTER) if adapters else WEIGHTS:
        found = fnmatch.filter(names, pattern)
        if found:
            small = [n for n in names if any(fnmatch.fnmatchcase(n, kind) for kind in FILES)]
            return list(dict.fromkeys([*small, *filter(is_companion, files), *found]))
    raise InputError(
        f"has no weights in a known format ({', '.join(WEIGHTS)})",
        "choose another, or convert it",
        field="model",
        value=name,
    )
