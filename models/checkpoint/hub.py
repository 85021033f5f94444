"""Resolution of a model's name: a directory, a `.gguf` file, an embedded model, a hub id."""

import os
import pathlib
import re

from models.errors import InputError

EMBEDDED = pathlib.Path(__file__).parents[1] / "embedded"
# Small files beside the weights.
FILES = ("*.json", "*.model", "*.txt", "*.jinja")
# Patterns of weights by preference; only one format is downloaded.
WEIGHTS = ("*.safetensors", "flax_model*.msgpack", "pytorch_model*.bin")


def resolve(name: str, weights: bool = True) -> pathlib.Path:
    """Find a model, downloading it from the Hugging Face hub if needed.

    Args:
      name: Directory, `.gguf` file, "embedded:NAME", or hub id "owner/name".
      weights: True to download the weights of a hub id; False for its `config.json` alone.

    Returns:
      Local directory or `.gguf` file.

    Raises:
      InputError: No such model is known, or the hub cannot deliver it.
    """
    if name.startswith("embedded:"):
        known = {f"embedded:{p.name}": p for p in sorted(EMBEDDED.iterdir()) if p.is_dir()}
        if name not in known:
            raise InputError(
                "is no embedded model", f"there are {', '.join(known)}", field="model", value=name
            )
        return known[name]
    path = pathlib.Path(os.path.expanduser(name))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise InputError(
            "is neither a directory nor a .gguf file",
            "name a Hugging Face checkpoint directory or a .gguf file",
            field="model",
            value=name,
        )
    # "./x" is meant as a path.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise InputError(
            "is no such directory or file, and not a hub id (owner/name)",
            "check the spelling",
            field="model",
            value=name,
        )
    return _download(name, weights)


def _weights_pattern(name: str) -> str:
    """Return the pattern of a repository's weights in the first format that it has."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name)
    except Exception:
        # Offline: the cache may still hold the model; snapshot_download reports it if not.
        files = []
    for pattern in WEIGHTS:
        if any(pathlib.PurePath(f).match(pattern) and "/" not in f for f in files):
            return pattern
    return "*.safetensors"


def _download(name: str, weights: bool) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    patterns = [*FILES, _weights_pattern(name)] if weights else ["config.json"]
    try:
        # Folders of a repository hold other formats, such as ONNX.
        return pathlib.Path(
            snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"])
        )
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"cannot be fetched from the hub ({reason})",
            "check the name and the network, or give a local directory",
            field="model",
            value=name,
        ) from None
