"""A checkpoint's own tokenizer as two small functions: text to token ids, and back."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from models.checkpoint.gguf import gguf_tokenizer
from models.errors import InputError, first_line
from models.untrusted import panics_as_errors

if TYPE_CHECKING:
    import tokenizers

# Without a tokenizer.json, transformers can build the tokenizer from any one of these.
OLDER_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
COPY_AGAIN = "copy it again from the original model"


class Tokenizer(Protocol):
    """A function from text to token ids."""

    def __call__(self, text: str, special: bool = False) -> list[int]:
        """Tokenize a text.

        Args:
          text: The text.
          special: Add the special tokens that this tokenizer puts around every text by default:
            BOS, EOS, both or none.

        Returns:
          Token ids.
        """
        ...


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A `Tokenizer` that can also decode.

    Attributes:
      encode: (text, special) -> token ids, as `Tokenizer` defines them.
      decode: Token ids -> text, without special tokens.
    """

    encode: Callable[[str, bool], list[int]]
    decode: Callable[[Sequence[int]], str]

    def __call__(self, text: str, special: bool = False) -> list[int]:
        """Tokenize a text; see `Tokenizer`."""
        return self.encode(text, special)

    def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Return the text that new tokens add to a prompt.

        Args:
          prompt: Token ids of the prompt.
          new: Token ids behind it.

        Returns:
          Text of `new`.
        """
        # Decoded together: alone, a first token can lose its leading space.
        return self.decode([*prompt, *new])[len(self.decode(prompt)) :]


def has_tokenizer(model: pathlib.Path) -> bool:
    """Return whether a checkpoint has a tokenizer, readable or not.

    Args:
      model: A checkpoint's directory, or a `.gguf` file.
    """
    return model.is_file() or any(
        (model / name).is_file() for name in ("tokenizer.json", *OLDER_FILES)
    )


def load_tokenizer(model: pathlib.Path) -> TextTokenizer:
    """Load the tokenizer of a checkpoint.

    Truncation and padding that the files ask for are switched off.

    Args:
      model: A checkpoint's directory, or a `.gguf` file.

    Returns:
      The tokenizer.

    Raises:
      InputError: The checkpoint has no tokenizer, or one that cannot be read.
    """
    if model.is_file():
        return _from_backend(gguf_tokenizer(model), model)
    # The `tokenizers` library imports in under 0.1 s, transformers takes seconds: older formats
    # alone need it.
    if (model / "tokenizer.json").is_file():
        return _from_json(model / "tokenizer.json")
    if any((model / name).is_file() for name in OLDER_FILES):
        return _from_transformers(model)
    raise InputError(
        f"{model} has no tokenizer",
        f"put tokenizer.json (or {', '.join(OLDER_FILES)}) there, or give all data as .npy tokens",
    )


def _from_json(file: pathlib.Path) -> TextTokenizer:
    """Load a `tokenizer.json`."""
    import tokenizers

    try:
        with panics_as_errors():
            backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise InputError(
            f"{file} cannot be read as a tokenizer ({first_line(e)})", COPY_AGAIN
        ) from e
    return _from_backend(backend, file)


def _from_backend(backend: "tokenizers.Tokenizer", file: pathlib.Path) -> TextTokenizer:
    """Wrap a tokenizer of the `tokenizers` library, read from a file."""
    # Stored limits would cut the long texts that windows are taken from; transformers ignores them.
    backend.no_truncation()
    backend.no_padding()

    def encode(text: str, special: bool) -> list[int]:
        # The fast form leaves out the tokens' places in the text: half the time and memory.
        return backend.encode_batch_fast([text], add_special_tokens=special)[0].ids

    return _checked(encode, lambda ids: backend.decode(list(ids), skip_special_tokens=True), file)


def _from_transformers(directory: pathlib.Path) -> TextTokenizer:
    """Load a tokenizer of an older format."""
    import transformers

    try:
        with panics_as_errors():
            # Code of a checkpoint is never run, and nobody is asked for leave.
            backend: Any = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except Exception as e:  # OSError, ValueError, ImportError, KeyError and others, by format
        raise InputError(
            f"transformers cannot read the tokenizer in {directory} ({first_line(e)})",
            "put the model's tokenizer.json there, or pip install sentencepiece",
        ) from e

    return _checked(
        # Not verbose: a text may be longer than the context, windows are cut from it.
        lambda text, special: backend(text, add_special_tokens=special, verbose=False)["input_ids"],
        lambda ids: backend.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        directory,
    )


def _checked(
    encode: Callable[[str, bool], list[int]],
    decode: Callable[[Sequence[int]], str],
    file: pathlib.Path,
) -> TextTokenizer:
    """Return a tokenizer whose failures name its file; damaged ones load and then cannot work."""

    def checked(work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with panics_as_errors():
                return work(*arguments)
        except Exception as e:  # the libraries raise bare Exceptions
            raise InputError(
                f"the tokenizer of {file} does not work ({first_line(e)})", COPY_AGAIN
            ) from e

    return TextTokenizer(
        lambda text, special: checked(encode, text, special), lambda ids: checked(decode, ids)
    )
