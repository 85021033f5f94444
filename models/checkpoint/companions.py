"""Files beside the weights of a checkpoint: tokenizer, generation settings, licence.

A checkpoint comes from anyone, and its files travel to whoever gets the pruned model. Only data
goes along, never code: a list of names says what is copied, and a tokenizer's configuration loses
what names a class of its own.
"""

import fnmatch
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from models.untrusted import UserFile

TOKENIZER_CONFIG = "tokenizer_config.json"
# Names by transformers, of data alone; licences by their usual names.
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer*.model",
    "tokenizer*.model.v[0-9]*",
    "sentencepiece*.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Chat templates by name, in a folder of their own.
TEMPLATES = "additional_chat_templates"
# Licences, in any case, and their endings: LICENSE.py would be code.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
TEXTS = ("", ".txt", ".md", ".rst", ".html", ".pdf")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON with a final newline.

    Args:
      path: The file.
      value: JSON-able value; infinities and NaN are written as Python's json does.
    """
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_config(directory: pathlib.Path) -> dict[str, Any]:
    """Read the tokenizer's configuration of a checkpoint.

    Its integers become floats: `model_max_length` of many models is 10**30, which means none.

    Args:
      directory: The checkpoint.

    Returns:
      The fields; empty if the checkpoint has no such file.

    Raises:
      InputError: The file cannot be read.
    """
    file = directory / TOKENIZER_CONFIG
    return UserFile(file).read_fields() if file.is_file() else {}


def copy_companions(
    source: pathlib.Path, target: pathlib.Path, config: Mapping[str, Any]
) -> list[str]:
    """Copy the tokenizer, the generation settings and the licence of a checkpoint.

    Args:
      source: Checkpoint directory, or `.gguf` file whose tokenizer is written out.
      target: Directory to copy to.
      config: Contents of the new `config.json`, whose token ids fill a missing
        generation_config.json.

    Returns:
      Sentences about what did not travel.
    """
    remarks: list[str] = []
    if source.is_file():
        # Imported on demand: it needs an optional package.
        from models.checkpoint.gguf import gguf_tokenizer, gguf_tokenizer_config

        gguf_tokenizer(source).save(str(target / "tokenizer.json"))
        write_json(target / TOKENIZER_CONFIG, gguf_tokenizer_config(source))
    else:
        remarks += _copy_files(source, target)
        remarks += _copy_tokenizer_config(source, target)
    if not (target / "generation_config.json").exists():
        # transformers reads the end token from this file first.
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        tokens = {k: config[k] for k in keys if config.get(k) is not None}
        write_json(target / "generation_config.json", tokens)
    return remarks


def _copy_files(source: pathlib.Path, target: pathlib.Path) -> Iterator[str]:
    """Copy the files that are data; yield remarks about those that cannot be."""
    files = [*sorted(source.iterdir()), *sorted((source / TEMPLATES).glob("*.jinja"))]
    for file in files:
        if not is_companion(file.relative_to(source).as_posix()):
            continue
        if not file.is_file():
            continue
        data = _read(file, source)
        if isinstance(data, str):
            yield data
            continue
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(data)


def _read(file: pathlib.Path, source: pathlib.Path) -> bytes | str:
    """Return what a file of a checkpoint holds, or a remark if it must or can not be read."""
    if not is_inside(file, source):
        return f"{file.name} is a link out of the model's directory: it was not copied"
    try:
        return file.read_bytes()
    except OSError as e:
        return f"{file.name} cannot be read ({e.strerror}): it was not copied"


def is_companion(name: str) -> bool:
    """Return True for a file that travels with a pruned model.

    Args:
      name: Its path in the checkpoint's directory, with slashes.
    """
    # Other folders hold other formats.
    if "/" in name:
        return fnmatch.fnmatchcase(name, f"{TEMPLATES}/*.jinja")
    if pathlib.PurePath(name).suffix.lower() in TEXTS:
        upper = name.upper()
        if any(fnmatch.fnmatchcase(upper, pattern) for pattern in LICENCES):
            return True
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in COPIED)


def is_inside(file: pathlib.Path, directory: pathlib.Path) -> bool:
    """Return whether a file lies in a checkpoint's directory, links followed.

    Args:
      file: A file of the directory, possibly a link.
      directory: The checkpoint.
    """
    real, home = file.resolve(), directory.resolve()
    if real.is_relative_to(home):
        return True
    # The hub's cache: snapshots/COMMIT holds links to the files of the same model in blobs.
    blobs = home.parent.parent / "blobs"
    return home.parent.name == "snapshots" and real.parent == blobs


def _copy_tokenizer_config(source: pathlib.Path, target: pathlib.Path) -> Iterator[str]:
    """Copy the tokenizer's configuration without the code it names; yield remarks about that."""
    file = source / TOKENIZER_CONFIG
    if not file.is_file():
        return
    data = _read(file, source)
    if isinstance(data, str):
        yield data
        return
    try:
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        yield f"{file.name} is no JSON object: it was not copied"
        return
    if "auto_map" not in config:
        (target / file.name).write_bytes(data)
        return
    del config["auto_map"]
    if (source / "tokenizer.json").is_file():
        # The class beside the checkpoint is gone; this one reads tokenizer.json as it is.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        yield (
            "the tokenizer's own code was not copied: transformers reads its tokenizer.json with "
            "PreTrainedTokenizerFast"
        )
    else:
        yield (
            "the tokenizer's own code was not copied, and without a tokenizer.json it does not "
            "load: take the tokenizer from the source"
        )
    write_json(target / file.name, config)
