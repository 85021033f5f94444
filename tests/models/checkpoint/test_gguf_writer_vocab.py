"""Tokenizers survive GGUF metadata: the same ids, or a refusal."""

import json
import os
import pathlib
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from models.checkpoint.gguf_vocab import WHOLE_WORDS, WORDS, build_tokenizer
from models.checkpoint.gguf_writer_vocab import load_backend, vocab_metadata
from models.checkpoint.hub import EMBEDDED
from models.errors import InputError
from reference import tiny_tokenizer

CONFIG = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": [2, 1]}
TEXT = pathlib.Path(__file__).read_text() + "  naïve\t\n\n日本 🙂 x_y==3.14 1234567 I'VE"


def described(directory: pathlib.Path, config: dict[str, Any]) -> tuple[dict[str, Any], Tokenizer]:
    """Return the metadata of a checkpoint's tokenizer, and the tokenizer."""
    return vocab_metadata(directory, load_backend(directory), config), load_backend(directory)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_the_embedded_tokenizers_give_the_same_ids(name: str) -> None:
    directory = EMBEDDED / name
    metadata, theirs = described(directory, json.loads((directory / "config.json").read_text()))
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.add_bos_token"] and not metadata["tokenizer.ggml.add_eos_token"]
    ours = build_tokenizer(metadata, directory)
    assert ours.encode(TEXT).ids == theirs.encode(TEXT).ids


def test_a_sentencepiece_tokenizer_gives_the_same_ids(shared: pathlib.Path) -> None:
    directory = shared / "models/stories260K"
    metadata, theirs = described(directory, json.loads((directory / "config.json").read_text()))
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    ours = build_tokenizer(metadata, directory)
    for line in (shared / "data/wikitext2/wiki.test.raw").read_text("utf-8").split("\n")[:200]:
        assert ours.encode(line).ids == theirs.encode(line).ids, line


def test_smollm2s_tokenizer_gives_the_same_ids() -> None:
    directory = pathlib.Path(os.environ.get("TOPIARY_SMOLLM2", ""))
    if not (directory / "tokenizer.json").is_file():
        pytest.skip("needs TOPIARY_SMOLLM2")
    metadata, theirs = described(directory, json.loads((directory / "config.json").read_text()))
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.bos_token_id"] == 1
    ours = build_tokenizer(metadata, directory)
    assert ours.encode(TEXT).ids == theirs.encode(TEXT).ids


@pytest.mark.parametrize("name", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_the_way_to_cut_words_is_recognised(name: str, tmp_path: pathlib.Path) -> None:
    made = tiny_tokenizer.tokenizer()
    made.model.ignore_merges = name in WHOLE_WORDS
    made.normalizer = normalizers.NFC() if name == "qwen2" else None
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in WORDS[name]]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    assert described(tmp_path, CONFIG)[0]["tokenizer.ggml.pre"] == name


def test_special_tokens_come_from_the_tokenizer_then_the_configuration(
    tmp_path: pathlib.Path,
) -> None:
    tiny_tokenizer.write(tmp_path, bos=False)
    settings = {"bos_token": {"content": "<s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("{{ hello }}")
    metadata, _ = described(tmp_path, {**CONFIG, "vocab_size": 99})
    ids = {k: metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "padding")}
    assert ids == {"bos": 1, "eos": 2, "padding": None}
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == "{{ hello }}"
    # Rows of the embedding that no token uses.
    assert metadata["tokenizer.ggml.tokens"][-3:] == ["[PAD96]", "[PAD97]", "[PAD98]"]
    assert metadata["tokenizer.ggml.token_type"][-4:] == [1, 5, 5, 5]


def unknown_cut() -> Tokenizer:
    made = tiny_tokenizer.tokenizer()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    return made


def one_split_a_token() -> Tokenizer:
    """Byte fallback with trained merges: "abc" comes of "ab" alone, not of "bc" too."""
    pieces = ["<unk>", "▁", "a", "b", "c", "ab", "bc", "abc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    made = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    return made


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "it is WordLevel, not BPE"),
        (unknown_cut, "no kind of GGUF tokenizer gives the same ids"),
        (one_split_a_token, "its merges do not follow SentencePiece's scores"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    tokenizer: Any, says: str, tmp_path: pathlib.Path
) -> None:
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=f"output_format=gguf cannot hold the tokenizer .*{says}"):
        described(tmp_path, CONFIG)


def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="it cannot be read"):
        load_backend(tmp_path)
