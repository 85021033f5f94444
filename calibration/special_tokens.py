"""Read the tokens that begin and end a text, as a checkpoint names them."""

from collections.abc import Callable
from typing import Literal

from calibration.tokenizer import Tokenizer, has_tokenizer
from models.checkpoint.reader import Checkpoint
from models.errors import InputError
from models.untrusted import UserFile, is_count


def special_tokens(checkpoint: Checkpoint, name: Literal["bos", "eos"]) -> list[int]:
    """Return the tokens that begin or end a text; empty if the checkpoint names none.

    Args:
      checkpoint: Its `generation_config.json` is read first, then its `config.json`.
      name: "bos" or "eos".

    Raises:
      InputError: The file cannot be read, or names something else than tokens.
    """
    key, file = f"{name}_token_id", checkpoint.directory / "generation_config.json"
    again = "copy it again from the original model"
    settings = UserFile(file, remedy=again).read_json() if file.is_file() else {}
    value = settings.get(key, checkpoint.config.get(key))
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise InputError(f"{key} in {file} is no token id", again)
    return tokens


def start_token(checkpoint: Checkpoint, tokenizer: Callable[[], Tokenizer]) -> int:
    """Return the token that a model's texts begin with.

    BOS of the configuration; else what the tokenizer puts before a text; else EOS, which stands
    between the texts that such models were trained on.

    Args:
      checkpoint: The model.
      tokenizer: Returns its tokenizer; called if it has one and the configuration has no BOS.

    Raises:
      InputError: There is none of these in the model's vocabulary.
    """
    found = special_tokens(checkpoint, "bos")
    if not found and has_tokenizer(checkpoint.directory):
        found = tokenizer()("", special=True)
    found = found or special_tokens(checkpoint, "eos")
    # Some configurations write -1 for none.
    vocab = checkpoint.model.arch.config.vocab
    start = next((token for token in found if is_count(token, 0, vocab - 1)), None)
    if start is None:
        raise InputError(
            f"{checkpoint.directory} names no token that begins or ends a text",
            "add bos_token_id to config.json",
        )
    return start
