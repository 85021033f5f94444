"""From what a user writes after `--model=` to a path: a directory, a `.gguf` file, an embedded model, a Hugging Face hub id."""

import os
import pathlib
import re

from models.errors import InputError

EMBEDDED = pathlib.Path(__file__).parents[1] / "embedded"
# Weights in one format only, and everything small beside them.
FILES = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHTS = ("*.safetensors", "flax_model*.msgpack", "pytorch_model*.bin")


def resolve(name: str, weights: bool = True) -> pathlib.Path:
    """The local directory or `.gguf` file of a model; a hub id is downloaded (or taken from the cache).

    Args:
      weights: of a hub id; else its `config.json` alone.
    Raises InputError when there is no such thing, with what to do.
    """
    if name.startswith("embedded:"):
        known = {f"embedded:{p.name}": p for p in sorted(EMBEDDED.iterdir()) if p.is_dir()}
        if name not in known:
            raise InputError(f"there is no embedded model {name!r}: there are {', '.join(known)}")
        return known[name]
    path = pathlib.Path(os.path.expanduser(name))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise InputError(f"--model={name} is neither a directory nor a .gguf file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise InputError(
            f"--model={name}: no such directory or file, and not a hub id (owner/name)"
        )
    return _download(name, weights)


def _format(name: str) -> str:
    """The pattern of a repository's weights, in the first of the formats that it has."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name)
    except Exception:
        files = []  # offline: the cache may still hold it, and snapshot_download says so if not
    return next(
        (w for w in WEIGHTS if any(pathlib.PurePath(f).match(w) and "/" not in f for f in files)),
        "*.safetensors",
    )


def _download(name: str, weights: bool) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    wanted = [*FILES, _format(name)] if weights else ["config.json"]
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"--model={name} cannot be fetched from the hub ({reason}): check the name and the network, or give a local directory"
        ) from None
