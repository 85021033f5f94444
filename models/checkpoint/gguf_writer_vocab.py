"""A checkpoint's tokenizer as the `tokenizer.ggml.*` metadata of a GGUF file.

GGUF names how text is cut into words instead of giving the rule. The name is found by trying: the
metadata is accepted only if the tokenizer that it describes gives the checkpoint's own ids.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.checkpoint.companions import tokenizer_config
from models.checkpoint.gguf_names import TOKENS
from models.checkpoint.gguf_vocab import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    WHOLE_WORDS,
    WORDS,
    build_tokenizer,
)
from models.errors import InputError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNUSED = 1, 5  # the format's token types of all other tokens
_PREFIX = "tokenizer.ggml."
# Texts on which the known ways to cut words differ.
_PROBES = (
    "",
    "Hello world, it's 3:45 o'clock; we'VE paid $1,234,567.89 (about 5%)!",
    "  two  spaces\ttab\r\n\r\n   indented line \n\n\nlast ",
    "x=[i**2 for i in range(10)] # café naïve São Paulo É e\u0301 I'M YOU'LL",
    "日本語のテキスト 中文 한국어 Привет мир Ελληνικά עברית नमस्ते 🙂👍🏽 ²½①",
    "snake_case CamelCase https://example.org/a?b=c&d=e ...---... \u00a0\u2009end",
)


def vocab_metadata(
    directory: pathlib.Path, backend: "Tokenizer", config: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe a tokenizer as the metadata of a GGUF file.

    Args:
      directory: Checkpoint directory with `tokenizer_config.json`.
      backend: Its tokenizer.
      config: Contents of `config.json`.

    Returns:
      Metadata, each value a string, a boolean, an integer, or a list of one type.

    Raises:
      InputError: GGUF has no metadata that gives the same ids.
    """
    backend.no_truncation()
    backend.no_padding()
    spec = json.loads(backend.to_str())
    if spec["model"].get("type") != "BPE":
        raise _inexpressible(directory, f"it is {spec['model'].get('type')}, not BPE")
    fields = _tokens(spec, backend, config) | _special(directory, backend, config)
    # SentencePiece's BPE falls back to bytes; byte-level BPE needs no fallback.
    if spec["model"].get("byte_fallback"):
        fields |= _scores(directory, spec, fields["tokens"])
        guesses: Iterator[dict[str, Any]] = iter(
            {"model": "llama", "pre": "default", "add_space_prefix": p} for p in (True, False)
        )
    else:
        fields["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
        whole = bool(spec["model"].get("ignore_merges"))
        guesses = ({"model": "gpt2", "pre": name} for name in _cuts_alike(backend, whole))
    wanted = _ids(backend)
    for guess in guesses:
        metadata = {_PREFIX + key: value for key, value in (fields | guess).items()}
        if _ids(build_tokenizer(metadata, directory)) == wanted:
            return metadata | _chat_template(directory)
    raise _inexpressible(directory, "no kind of GGUF tokenizer gives the same ids")


def _inexpressible(directory: pathlib.Path, reason: str) -> InputError:
    """Return the error for a tokenizer that GGUF cannot hold."""
    return InputError(
        f"cannot hold the tokenizer of {directory}: {reason}",
        "leave `output_format` out, and convert the result with llama.cpp's own script",
        field="output_format",
        value="gguf",
    )


def _ids(tokenizer: "Tokenizer") -> list[list[int]]:
    """Return the ids of every probe, with the tokens that open and close a text."""
    return [tokenizer.encode(text).ids for text in _PROBES]


def _tokens(
    spec: Mapping[str, Any], backend: "Tokenizer", config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the tokens and their types, one for each row of the embedding."""
    names = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    added = {t["id"]: CONTROL if t["special"] else USER_DEFINED for t in spec["added_tokens"]}
    tokens, types = [], []
    for i in range(config["vocab_size"]):
        token = names.get(i)
        # Embeddings are often longer than the vocabulary.
        tokens.append(f"[PAD{i}]" if token is None else token)
        if token is None:
            types.append(_UNUSED)
        elif token == spec["model"].get("unk_token"):
            types.append(UNKNOWN)
        elif spec["model"].get("byte_fallback") and token.startswith("<0x"):
            types.append(BYTE)
        else:
            types.append(added.get(i, _NORMAL))
    return {"tokens": tokens, "token_type": types}


def _special(
    directory: pathlib.Path, backend: "Tokenizer", config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the ids of special tokens, and which of them open or close every text."""
    named = tokenizer_config(directory)
    fields: dict[str, Any] = {}
    for role, key in {**TOKENS, "unk": "unknown"}.items():
        token = named.get(f"{role}_token")
        # transformers 4 wrote the settings of the token around its text.
        token = token.get("content") if isinstance(token, dict) else token
        known = backend.token_to_id(token) if isinstance(token, str) else None
        # config.json may list several that end a text.
        listed = config.get(f"{role}_token_id")
        listed = listed[0] if isinstance(listed, list) and listed else listed
        token_id = known if known is not None else listed
        if isinstance(token_id, int) and 0 <= token_id < config["vocab_size"]:
            fields[f"{key}_token_id"] = token_id
    inner = backend.encode("a", add_special_tokens=False).ids
    outer = backend.encode("a").ids
    # What opens a text is its BOS, whatever the files call it.
    start = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), 0)
    head, tail = outer[:start], outer[start + len(inner) :]
    for name, around in (("bos", head), ("eos", tail)):
        fields[f"add_{name}_token"] = bool(around)
        if around:
            fields[f"{name}_token_id"] = around[0]
    return fields


def _scores(
    directory: pathlib.Path, spec: Mapping[str, Any], tokens: Sequence[str]
) -> dict[str, Any]:
    """Return SentencePiece's scores: the higher, the earlier a token's pairs are joined."""
    merges = [tuple(pair) for pair in spec["model"]["merges"]]
    joined = list(dict.fromkeys(a + b for a, b in merges))
    score = {token: -float(rank) for rank, token in enumerate(joined)}
    # A score joins every pair that gives the token, at one rank: merges must do the same.
    added = {t["content"] for t in spec["added_tokens"]}
    pieces = {t for t in spec["model"]["vocab"] if t not in added and not t.startswith("<0x")}
    pairs = {
        (t[:i], t[i:])
        for t in pieces
        for i in range(1, len(t))
        if t[:i] in pieces and t[i:] in pieces
    }
    ranks = [score[a + b] for a, b in merges]
    if pairs != set(merges) or ranks != sorted(ranks, reverse=True):
        raise _inexpressible(directory, "its merges do not follow SentencePiece's scores")
    # Single characters and special tokens come of no merge.
    return {"scores": [score.get(token, 0.0) for token in tokens]}


def _cuts_alike(backend: "Tokenizer", whole: bool) -> Iterator[str]:
    """Yield the names of the pre-tokenizers that cut the probes as a byte-level tokenizer does."""
    wanted = _words(backend)
    for name in WORDS:
        empty = {"model": "gpt2", "pre": name, "tokens": [], "merges": []}
        known = build_tokenizer({_PREFIX + k: v for k, v in empty.items()}, pathlib.Path())
        # Whether words that are tokens are kept whole follows from the name too.
        if (name in WHOLE_WORDS) == whole and _words(known) == wanted:
            yield name


def _words(tokenizer: "Tokenizer") -> list[Any]:
    """Return the words of every probe, before merges."""
    normalizer, cut = tokenizer.normalizer, tokenizer.pre_tokenizer
    texts = [normalizer.normalize_str(t) if normalizer else t for t in _PROBES]
    return [cut.pre_tokenize_str(t) if cut else [] for t in texts]


def _chat_template(directory: pathlib.Path) -> dict[str, str]:
    """Return the chat template of a checkpoint, from its own file or the tokenizer's settings."""
    file = directory / "chat_template.jinja"
    template = tokenizer_config(directory).get("chat_template")
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def load_backend(directory: pathlib.Path) -> "Tokenizer":
    """Load a checkpoint's tokenizer as one of the `tokenizers` library.

    Args:
      directory: Checkpoint directory.

    Returns:
      Tokenizer.

    Raises:
      InputError: There is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        # Older formats alone need transformers, which takes seconds to import.
        from transformers import AutoTokenizer

        backend: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return backend.backend_tokenizer
    except Exception as e:  # either library raises bare or many kinds of exceptions
        raise _inexpressible(directory, f"it cannot be read ({first_line(e)})") from e
