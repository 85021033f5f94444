"""What the dense and the pruned model say to the same two prompts: a figure hides a model that repeats itself, a text does not."""

from collections.abc import Callable

import numpy as np

from calibration.states import fits_in_memory
from calibration.tokenizer import TextTokenizer
from launch.generate import continuation, eos_tokens, prompt_tokens
from models.checkpoint.reader import Checkpoint
from models.errors import InputError
from models.generate import generate

PROMPTS = (
    "Once there was a kind girl named Lucy, who lived near the sea. One day",
    "The three largest cities of Europe are London,",
)
NEW_TOKENS = 32


def samples(
    dense: Checkpoint, pruned: Checkpoint, tokenizer: Callable[[], TextTokenizer]
) -> list[dict[str, str]]:
    """[{prompt, dense, pruned}], greedy. Empty without a tokenizer of the model's, for a model that is not held whole here
    (`calibration.states.fits_in_memory`), or one with too few positions.

    The prompts are cut to the same number of tokens, so that one batch and one compilation serve both.
    """
    try:
        encoded = [prompt_tokens(tokenizer(), prompt, dense) for prompt in PROMPTS]
    except InputError:
        return []
    prompts = np.asarray([ids[: min(map(len, encoded))] for ids in encoded], np.int32)
    room = (
        getattr(dense.model.arch.config, "positions", prompts.shape[1] + NEW_TOKENS)
        - prompts.shape[1]
    )
    itemsize = dense.model.non_block.embed.dtype.itemsize
    if room < NEW_TOKENS or not fits_in_memory(dense.parameters * itemsize):
        return []
    non_block = eos_tokens(dense)
    texts = [generate(c.model, prompts, NEW_TOKENS, eos=non_block) for c in (dense, pruned)]
    return [
        {
            "prompt": tokenizer().decode(ids),
            **{
                name: continuation(tokenizer(), ids, text[i], non_block)
                for name, text in zip(("dense", "pruned"), texts, strict=True)
            },
        }
        for i, ids in enumerate(prompts.tolist())
    ]
