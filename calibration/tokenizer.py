"""A checkpoint's own tokenizer as two small functions: text to token ids, and back."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from models.checkpoint.gguf import gguf_tokenizer
from models.errors import InputError

if TYPE_CHECKING:
    import tokenizers

# Any one of these lets transformers build the tokenizer of a checkpoint that has no tokenizer.json.
SLOW_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


class Tokenizer(Protocol):
    """Text to token ids. With `special`, plus what this tokenizer puts around every text by default (BOS, EOS, or nothing)."""

    def __call__(self, text: str, special: bool = False) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A Tokenizer that also knows the way back: `decode` gives the text of token ids, special tokens left out."""

    encode: Callable[[str, bool], list[int]]
    decode: Callable[[Sequence[int]], str]

    def __call__(self, text: str, special: bool = False) -> list[int]:
        """The token ids of a text, see Tokenizer."""
        return self.encode(text, special)

    def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text that tokens `new` add to tokens `prompt`: decoded together, as a first token alone may lose its leading space."""
        return self.decode([*prompt, *new])[len(self.decode(prompt)) :]


def load_tokenizer(model: pathlib.Path) -> TextTokenizer:
    """The tokenizer in a checkpoint's directory, or in a `.gguf` file.

    `tokenizer.json` is read by the `tokenizers` library, which imports in under a tenth of a second; only without one is
    `transformers.AutoTokenizer` asked, for the older formats. A truncation or padding stored in the file is switched off, as
    `transformers` does too.

    Raises InputError when there is no tokenizer, or one that cannot be read.
    """
    if model.is_file():
        return _from_backend(gguf_tokenizer(model))
    if (model / "tokenizer.json").is_file():
        return _from_json(model / "tokenizer.json")
    if any((model / name).is_file() for name in SLOW_FILES):
        return _from_transformers(model)
    expected = ", ".join(SLOW_FILES)
    raise InputError(
        f"{model} has no tokenizer: put tokenizer.json (or {expected}) there, or give all data as .npy tokens"
    )


def _from_json(file: pathlib.Path) -> TextTokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise InputError(
            f"{file} cannot be read as a tokenizer ({_first_line(e)}): copy it again from the original model"
        ) from e
    return _from_backend(backend)


def _from_backend(backend: "tokenizers.Tokenizer") -> TextTokenizer:
    backend.no_truncation()
    backend.no_padding()
    return TextTokenizer(
        lambda text, special: backend.encode(text, add_special_tokens=special).ids,
        lambda ids: backend.decode(list(ids), skip_special_tokens=True),
    )


def _from_transformers(directory: pathlib.Path) -> TextTokenizer:
    import transformers

    try:
        backend: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as e:  # OSError, ValueError, ImportError, KeyError and others, by format and by what is missing
        hint = "put the model's tokenizer.json there, or pip install sentencepiece"
        raise InputError(
            f"transformers cannot read the tokenizer in {directory} ({_first_line(e)}): {hint}"
        ) from e

    return TextTokenizer(
        # Not verbose: a warning that the text is longer than the model's context means nothing here, windows are cut from it.
        lambda text, special: backend(text, add_special_tokens=special, verbose=False)["input_ids"],
        lambda ids: backend.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
