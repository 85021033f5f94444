"""Files beside the weights of a checkpoint: tokenizer, generation settings, JSON."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

# Files of the tokenizer and the generation settings, by transformers' names.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON with a final newline.

    Args:
      path: The file.
      value: JSON-able value; infinities and NaN are written as Python's json does.
    """
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: pathlib.Path, target: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Copy the tokenizer and generation files of a checkpoint.

    Args:
      source: Checkpoint directory, or `.gguf` file whose tokenizer is written out.
      target: Directory to copy to.
      config: Contents of the new `config.json`, whose token ids fill a missing
        generation_config.json.
    """
    if source.is_file():
        # Imported on demand: it needs an optional package.
        from models.checkpoint.gguf import gguf_tokenizer, gguf_tokenizer_config

        gguf_tokenizer(source).save(str(target / "tokenizer.json"))
        write_json(target / "tokenizer_config.json", gguf_tokenizer_config(source))
    else:
        matches = {file for pattern in COPIED for file in source.glob(pattern)}
        for file in sorted(f for f in matches if f.is_file()):
            shutil.copyfile(file, target / file.name)
    if not (target / "generation_config.json").exists():
        # transformers reads the end token from this file first.
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        tokens = {k: config[k] for k in keys if config.get(k) is not None}
        write_json(target / "generation_config.json", tokens)
