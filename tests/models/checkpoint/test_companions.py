"""Data travels beside a pruned model, code and links out of the model's directory do not."""

import json
import pathlib
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from models.checkpoint.companions import copy_companions, tokenizer_config
from models.checkpoint.output_format import LAYOUT_OF, Shape, choose_form
from reference import tiny

DATA = [
    "LICENSE",
    "LICENSE.md",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "notice",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
]
CODE = [
    "LICENSE.py",
    "configuration_llama.py",
    "modeling_llama.py",
    "tokenization_tiny.py",
    "tokenizer.py",
    "tokenizer.pkl",
    "tokenizer_wrapper.so",
    "vocab.py",
    "vocab.pkl",
    "chat_template.py",
    "README.md",
    "training_args.bin",
]


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def target(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def names(folder: pathlib.Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_data_travels_and_code_does_not(source: pathlib.Path, target: pathlib.Path) -> None:
    for name in DATA + CODE:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("t")
    (source / "additional_chat_templates/tool_use.py").write_text("t")
    assert copy_companions(source, target, {}) == []
    assert names(target) == sorted([*DATA, "additional_chat_templates/tool_use.jinja"])
    assert (target / "LICENSE").read_text() == "LICENSE"


def write_tokenizer(folder: pathlib.Path, config: dict[str, Any]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_with_code_of_its_own_loads_without_it(
    source: pathlib.Path, target: pathlib.Path
) -> None:
    from transformers import AutoTokenizer

    named = {
        "tokenizer_class": "TinyTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]},
        "unk_token": "[UNK]",
    }
    write_tokenizer(source, named)
    (source / "tokenization_tiny.py").write_text("raise SystemExit('code of a checkpoint ran')")
    (remark,) = copy_companions(source, target, {})
    assert "own code was not copied" in remark
    (target / "config.json").write_text(json.dumps(tiny.GQA))
    loaded = AutoTokenizer.from_pretrained(target)
    assert loaded("b a c", add_special_tokens=False)["input_ids"] == [1, 0, 2]
    assert loaded.unk_token == "[UNK]"
    assert "auto_map" not in (target / "tokenizer_config.json").read_text()


def test_a_tokenizer_of_code_alone_is_said_not_to_load(
    source: pathlib.Path, target: pathlib.Path
) -> None:
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["t.T", null]}}')
    (remark,) = copy_companions(source, target, {})
    assert "does not load" in remark and (target / "tokenizer_config.json").read_text() == "{}\n"


def test_a_plain_tokenizer_config_travels_byte_for_byte(
    source: pathlib.Path, target: pathlib.Path
) -> None:
    (source / "tokenizer_config.json").write_bytes(b'{"b":1,\n\n"a": "\xc3\xa9"}')
    assert copy_companions(source, target, {}) == []
    name = "tokenizer_config.json"
    assert (target / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("text", ["[]", "{", "[" * 5000, "\x00"])
def test_an_odd_tokenizer_config_is_left_out_with_a_remark(
    source: pathlib.Path, target: pathlib.Path, text: str
) -> None:
    (source / "tokenizer_config.json").write_text(text)
    (remark,) = copy_companions(source, target, {})
    assert "no JSON object" in remark and names(target) == ["generation_config.json"]


def test_links_out_of_the_directory_are_not_followed(
    source: pathlib.Path, target: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x.jinja").write_text("secret")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        (source / name).symlink_to(secret / "x.jinja")
    (source / "additional_chat_templates").symlink_to(secret)
    (source / "vocab.json").symlink_to(source / "words.json")
    (source / "words.json").write_text("{}")
    remarks = copy_companions(source, target, {})
    assert len(remarks) == 4 and all("out of the model's directory" in r for r in remarks)
    assert names(target) == ["generation_config.json", "vocab.json"]


def test_a_file_that_cannot_be_read_is_left_out_with_a_remark(
    source: pathlib.Path, target: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "LICENSE").write_text("l")
    (source / "vocab.json").write_text("{}")
    read = pathlib.Path.read_bytes

    def read_some(file: pathlib.Path) -> bytes:
        if file.name == "LICENSE":
            raise PermissionError(13, "Permission denied")
        return read(file)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_some)
    (remark,) = copy_companions(source, target, {})
    assert "LICENSE cannot be read (Permission denied)" in remark
    assert names(target) == ["generation_config.json", "vocab.json"]


def test_links_of_the_hubs_cache_are_followed(target: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "abc").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot / "vocab.json").symlink_to("../../../other")
    (tmp_path / "other").write_text("{}")
    (remark,) = copy_companions(snapshot, target, {})
    assert "vocab.json" in remark and (target / "tokenizer.json").read_text() == "{}"


def test_no_field_of_config_json_names_code() -> None:
    named = {
        "auto_map": {"AutoTokenizer": "t.T", "AutoModelForCausalLM": "evil.Model"},
        "attn_implementation": "someone/kernels",
        "_attn_implementation": "someone/kernels",
        "_attn_implementation_internal": "someone/kernels",
        "_attn_implementation_autoset": True,
        "custom_pipelines": {"p": {"impl": "evil.Pipe"}},
        "kept": 1,
    }
    for shapes in ([Shape(2, 40), Shape(2, 40)], [Shape(1, 40), Shape(2, 40)]):
        form = choose_form(tiny.GQA | named, shapes, (), "auto")
        assert form.config["kept"] == 1
        ours = form.config.pop("auto_map", {})
        assert all(value.startswith("modeling_pruned.") for value in ours.values())
        assert not named.keys() & form.config.keys() - {"kept"}


WIDE = {**tiny.LLAMA, "hidden_size": 48, "num_attention_heads": 6, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "heads", "before", "after"),
    [
        ("llama", 6, "4.40.0", None),
        ("llama", 5, "4.40.0", LAYOUT_OF),  # a mistral now, whose tokenizer needs no mending
        ("llama", 5, None, LAYOUT_OF),
        ("mistral", 6, "4.40.0", "4.40.0"),  # a mistral before, whose tokenizer may need it
        ("mistral", 6, None, None),
    ],
)
def test_the_writer_of_before_is_not_named(
    kind: str, heads: int, before: str | None, after: str | None
) -> None:
    config = WIDE | {"model_type": kind, "sliding_window": None}
    if before:
        config["transformers_version"] = before
    form = choose_form(config, [Shape(heads, 40)] * 2, (), "auto")
    assert form.config.get("transformers_version") == after


def test_a_tokenizer_s_configuration_may_hold_the_length_that_means_none(
    tmp_path: pathlib.Path,
) -> None:
    """transformers writes int(1e30), as in LLaMA-2's files."""
    settings = {"bos_token": "<s>", "model_max_length": int(1e30)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_config(tmp_path)["bos_token"] == "<s>"
    assert tokenizer_config(tmp_path / "elsewhere") == {}
