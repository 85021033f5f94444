"""Tokenizers from the `tokenizer.ggml.*` metadata of a GGUF file.

Two kinds are known: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.errors import InputError
from models.untrusted import is_count, panics_as_errors, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The format's token types that matter here.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6

# Expressions that cut text into words, applied one after the other, by llama.cpp's name of the
# pre-tokenizer (src/llama-vocab.cpp). They are those of the tokenizer.json files behind the names.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe"), (_LLAMA3,)
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_LLAMA3.replace("{1,3}", ""),)),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "tekken": (_TEKKEN,),
}
# Pre-tokenizers after which a word that is a token is kept whole, whatever the merges say.
# llama.cpp also prepends BOS after these, unless the metadata says otherwise.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
_SPACE = "▁"  # SentencePiece's sign for a space
_REMEDY = "use the original checkpoint"
_LONGEST_TOKEN = 1024  # characters; every split of a token is looked up


def build_tokenizer(metadata: Mapping[str, Any], path: pathlib.Path) -> "Tokenizer":
    """Build the tokenizer that a GGUF file's metadata describes.

    Args:
      metadata: Metadata of the file.
      path: The file, for errors.

    Returns:
      Tokenizer.

    Raises:
      InputError: The kind or the pre-tokenizer is not known, or the vocabulary is absent or
        contradicts itself.
    """
    fields = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind, words = fields.get("model"), fields.get("pre", "default")
    # Metadata may be lists, which have no hash.
    if not isinstance(kind, str) or kind not in builders:
        raise InputError(
            f"{path}: tokenizer kind {shown(kind)} is not known, only {', '.join(builders)}",
            _REMEDY,
        )
    if kind == "gpt2" and (not isinstance(words, str) or words not in WORDS):
        raise InputError(
            f"{path}: pre-tokenizer {shown(words)} is not known, only {', '.join(WORDS)}", _REMEDY
        )
    try:
        with panics_as_errors():
            tokenizer = builders[kind](fields)
            _add_special_tokens(tokenizer, fields)
    except Exception as e:  # tokenizers raises bare Exceptions
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise InputError(f"{path}: its tokenizer contradicts itself ({reason})", _REMEDY) from e
    return tokenizer


def _byte_level(fields: Mapping[str, Any]) -> "Tokenizer":
    """Build a byte-level BPE tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = fields.get("pre", "default")
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Tokenizer(
        models.BPE(_vocabulary(fields), merges, ignore_merges=words in WHOLE_WORDS)
    )
    # Of the known pre-tokenizers only Qwen2's normalises.
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in WORDS[words]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any]) -> "Tokenizer":
    """Build a SentencePiece BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _vocabulary(fields)
    unknown = fields["tokens"][fields.get("unknown_token_id", 0)]
    merges = _merges(fields["tokens"], fields["scores"], fields["token_type"])
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = fields.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    )
    # The space that the normaliser put before the text is taken off again.
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of each token; ValueError if one occurs twice or is too long."""
    vocabulary = {token: i for i, token in enumerate(fields["tokens"])}
    longest = max(map(len, vocabulary), default=0)
    if longest > _LONGEST_TOKEN:
        raise ValueError(f"a token has {longest} characters")
    # Two ids of one token could not both be encoded.
    if len(vocabulary) != len(fields["tokens"]):
        raise ValueError("a token occurs twice")
    return vocabulary


def _merges(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """List the merges that make BPE join pairs in SentencePiece's order.

    SentencePiece joins the pair that gives the token of the highest score first.
    """
    score = {
        t: s
        for t, s, kind in zip(tokens, scores, types, strict=True)
        if kind not in (UNKNOWN, CONTROL, BYTE)
    }
    # GGUF keeps no merge list for this kind: every split of a token into two tokens is a merge.
    pairs = (
        (t[:i], t[i:]) for t in score for i in range(1, len(t)) if t[:i] in score and t[i:] in score
    )
    return sorted(pairs, key=lambda pair: -score[pair[0] + pair[1]])


def _add_special_tokens(tokenizer: "Tokenizer", fields: Mapping[str, Any]) -> None:
    """Add the tokens that are matched whole, and those that open or close every text."""
    from tokenizers import AddedToken, processors

    typed = list(zip(fields["tokens"], fields.get("token_type", ()), strict=False))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in typed if k in (UNKNOWN, CONTROL)]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=False) for t, k in typed if k == USER_DEFINED]
    )
    ends = {
        name: fields["tokens"][fields[f"{name}_token_id"]]
        for name in ("bos", "eos")
        if f"{name}_token_id" in fields
    }
    # llama.cpp's default where the metadata does not say.
    add_bos = "bos" in ends and (fields["model"] == "llama" or fields.get("pre") in WHOLE_WORDS)
    head = [ends["bos"]] if fields.get("add_bos_token", add_bos) else []
    tail = [ends["eos"]] if fields.get("add_eos_token", False) else []
    if head or tail:
        first, second = [*head, "$A:0", *tail], [*head, "$B:1", *tail]
        ids = [(token, tokenizer.token_to_id(token)) for token in {*head, *tail}]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=first, pair=first + second, special_tokens=ids
        )


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `tokenizer_config.json` that goes with the tokenizer.

    Args:
      metadata: Metadata of the file.

    Returns:
      Special tokens by role, and the chat template.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if is_count(token, 0, len(tokens) - 1):
            config[f"{role}_token"] = tokens[token]
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config
