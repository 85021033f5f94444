"""Tokenizers against transformers.AutoTokenizer, and directories without a readable tokenizer."""

import json
import logging
import pathlib
import subprocess
import sys

import gguf
import pytest
import tokenizers
import transformers

from calibration.tokenizer import load_tokenizer
from models.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [
    "",
    "Once upon a time",
    " two  spaces\n\n and\ttabs\r\n",
    "naïve café — “quotes” ☃ 🙂 \u2028",
    "<s> special </s> <|im_end|>",
    "x" * 3000,
]


def save_words(directory: pathlib.Path) -> tokenizers.Tokenizer:
    """Save a tokenizer of a few words that puts [CLS] before a text and [SEP] after it."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "c": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "name", ["tiny-llama", "tiny-llama-gqa", "tiny-opt", "stories260K", "smollm2"]
)
def test_ids_are_those_of_transformers(
    name: str, special: bool, request: pytest.FixtureRequest
) -> None:
    model = (
        request.getfixturevalue("smollm2")
        if name == "smollm2"
        else request.getfixturevalue("shared") / "models" / name
    )
    ours = load_tokenizer(model)
    theirs = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    for text in TEXTS:
        assert (
            ours(text, special=special)
            == theirs(text, add_special_tokens=special, verbose=False)["input_ids"]
        )


def test_special_tokens_are_the_tokenizers_own_and_off_by_default(tmp_path: pathlib.Path) -> None:
    save_words(tmp_path)
    tokenize = load_tokenizer(tmp_path)
    assert tokenize("a c b") == [3, 5, 4]
    assert tokenize("a c b", special=True) == [1, 3, 5, 4, 2]


def test_stored_truncation_and_padding_are_off(tmp_path: pathlib.Path) -> None:
    tokenizer = save_words(tmp_path)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8, pad_id=0)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode("a b c a b c").ids) == 8  # the file itself does both
    assert load_tokenizer(tmp_path)("a b c a b c") == [3, 4, 5, 3, 4, 5]
    assert load_tokenizer(tmp_path)("a") == [3]


def test_reading_tokenizer_json_does_not_import_transformers(tmp_path: pathlib.Path) -> None:
    save_words(tmp_path)
    code = (
        "import sys, pathlib; from calibration.tokenizer import load_tokenizer; "
        f"load_tokenizer(pathlib.Path({str(tmp_path)!r}))('a'); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def write_bpe(directory: pathlib.Path) -> None:
    """Write GPT-2's older format, vocab.json and merges.txt, with one merge."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet, "he"])}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\nh e\n")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 4})
    )


def test_older_formats_go_through_transformers(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    write_bpe(tmp_path)
    ids = load_tokenizer(tmp_path)("hehehe xhe")
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert ids == [vocabulary[token] for token in ["he", "he", "he", "Ġ", "x", "he"]]
    assert not caplog.records  # no warning that six tokens are more than model_max_length


def test_older_formats_add_their_own_special_tokens(tmp_path: pathlib.Path) -> None:
    write_bpe(tmp_path)
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenize = load_tokenizer(tmp_path)
    assert tokenize("he", special=True) == reference("he")["input_ids"]
    assert tokenize("he") == reference("he", add_special_tokens=False)["input_ids"]


def test_a_gguf_file_has_its_tokenizer_inside(tmp_path: pathlib.Path) -> None:
    write_bpe(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(vocabulary))
    writer.add_token_types(
        [gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(vocabulary) - 1)]
    )
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenize = load_tokenizer(tmp_path / "model.gguf")
    assert tokenize("xhe") == [vocabulary["x"], vocabulary["he"]]
    assert tokenize("xhe", special=True) == [0, vocabulary["x"], vocabulary["he"]]


def test_a_missing_tokenizer_names_the_expected_files(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        InputError,
        match=r"has no tokenizer: put tokenizer\.json \(or tokenizer\.model, .*vocab\.json",
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]"])
def test_a_broken_tokenizer_json_is_one_line(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        InputError, match=r"tokenizer\.json cannot be read as a tokenizer"
    ) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_older_format_is_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not sentencepiece")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer"})
    )
    with pytest.raises(InputError, match="transformers cannot read the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_loads_but_cannot_encode_is_one_line(tmp_path: pathlib.Path) -> None:
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer\.json does not work .*UNK") as caught:
        load_tokenizer(tmp_path)("b")
    assert "\n" not in str(caught.value)


def test_half_of_a_surrogate_pair_is_one_line(tmp_path: pathlib.Path) -> None:
    save_words(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer\.json does not work"):
        load_tokenizer(tmp_path)("a \ud83d b")


def test_code_beside_a_tokenizer_is_not_run_and_nobody_is_asked(tmp_path: pathlib.Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "own.py").write_text("raise AssertionError('ran')")
    (tmp_path / "config.json").write_text('{"model_type": "own"}')
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="transformers cannot read the tokenizer"):
        load_tokenizer(tmp_path)
