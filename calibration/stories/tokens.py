"""Train a tokenizer on the stories, and generate batches of their tokens."""

import itertools
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np
import tokenizers

from calibration.stories.generator import Split, stream

# Tokens 0 and 1. As in OPT, the tokenizer puts END before a text, so END also separates stories.
PAD, END = "<pad>", "</s>"
LEAST_VOCABULARY = 258  # every byte and the two special tokens
TOKENIZER_STORIES = 4000  # enough that every word of the grammar occurs
STORIES_PER_READ = 256  # stories that are tokenized together


def train_tokenizer(vocabulary: int, seed: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer on stories of the train split.

    Source: Radford et al. 2019, section 2.2.

    Args:
      vocabulary: Most tokens.
      seed: Decides the stories.

    Returns:
      The tokenizer.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 1)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        # Sorted: the library gives the bytes in no fixed order, and ids follow it.
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        itertools.islice(stream("train", seed), TOKENIZER_STORIES), trainer
    )
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path, length: int) -> None:
    """Write `tokenizer.json`, and the `tokenizer_config.json` that transformers needs to read it.

    Args:
      tokenizer: The tokenizer.
      directory: Directory of both files.
      length: Positions of the model.
    """
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def batches(
    tokenizer: tokenizers.Tokenizer, split: Split, seed: int, shape: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Generate batches of a split's stories, without end.

    Args:
      tokenizer: The tokenizer.
      split: The split.
      seed: Decides the stories.
      shape: (batch, length).

    Yields:
      Tokens int32 [batch length]: stories with END before each, without a gap between rows.
    """
    source = stream(split, seed)
    rest = np.zeros(0, np.int32)
    while True:
        read = tokenizer.encode_batch_fast(list(itertools.islice(source, STORIES_PER_READ)))
        tokens = np.concatenate([rest, *(np.array(story.ids, np.int32) for story in read)])
        whole = len(tokens) - len(tokens) % math.prod(shape)
        yield from tokens[:whole].reshape(-1, *shape)
        rest = tokens[whole:]
