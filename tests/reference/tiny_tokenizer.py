"""A byte-level tokenizer of 96 tokens, for the random models of `tiny`."""

import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<pad>", "<s>", "</s>")
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]


def tokenizer(bos: bool = True) -> Tokenizer:
    """Return the tokenizer; with `bos` every text begins with <s>."""
    # Newlines and spaces as byte-level BPE writes them, then ASCII from "!" on.
    pieces = [*SPECIAL, "Ċ", "Ġ", *(a + b for a, b in MERGES)]
    pieces += [chr(c) for c in range(33, 33 + 96 - len(pieces))]
    # The merges' letters must be pieces too: ASCII ends at "w".
    assert len(pieces) == 96 and {"t", "h", "e", "i", "n"} <= set(pieces)
    made = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return made


def write(directory: pathlib.Path, bos: bool = True) -> None:
    """Write the tokenizer's files into a checkpoint's directory."""
    tokenizer(bos).save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings["chat_template"] = "{{ messages[0].content }}"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
