"""Generate text with the dense and the pruned model, for the report.

Figures do not show a model that repeats itself; a text does.
"""

from collections.abc import Callable

import numpy as np

from calibration.states import fits_in_memory
from calibration.tokenizer import TextTokenizer, has_tokenizer
from launch.generate import continuation, eos_tokens, prompt_tokens
from models.checkpoint.reader import Checkpoint
from models.generate import generate
from models.progress import Progress, no_progress

PROMPTS = (
    "Once there was a kind girl named Lucy, who lived near the sea. One day",
    "The three largest cities of Europe are London,",
)
NEW_TOKENS = 32


def samples(
    dense: Checkpoint,
    pruned: Checkpoint,
    tokenizer: Callable[[], TextTokenizer],
    progress: Progress = no_progress,
) -> list[dict[str, str]]:
    """Continue the prompts greedily with both models.

    Args:
      dense: The dense model.
      pruned: The pruned model.
      tokenizer: Returns the model's tokenizer.
      progress: Shows the progress.

    Returns:
      {"prompt", "dense", "pruned"} for each prompt. Empty if the model has no tokenizer, is too
      large to be held whole, or has too few positions.

    Raises:
      InputError: The tokenizer or the generation settings do not fit the model.
    """
    if not has_tokenizer(dense.directory):
        return []
    encoded = [prompt_tokens(tokenizer(), prompt, dense) for prompt in PROMPTS]
    # Cut to the same number of tokens, so that one batch and one compilation serve both.
    length = min(map(len, encoded))
    prompts = np.asarray([ids[:length] for ids in encoded], np.int32)
    needed = length + NEW_TOKENS
    itemsize = dense.model.non_block.embed.dtype.itemsize
    if getattr(dense.model.arch.config, "positions", needed) < needed:
        return []
    if not fits_in_memory(dense.parameters * itemsize):
        return []
    eos = eos_tokens(dense)
    advance = progress("generating samples", 2, unit="models")
    dense_ids = generate(dense.model, prompts, NEW_TOKENS, eos=eos)
    advance()
    pruned_ids = generate(pruned.model, prompts, NEW_TOKENS, eos=eos)
    advance()
    result = []
    for i, ids in enumerate(prompts.tolist()):
        result.append(
            {
                "prompt": tokenizer().decode(ids),
                "dense": continuation(tokenizer(), ids, dense_ids[i], eos),
                "pruned": continuation(tokenizer(), ids, pruned_ids[i], eos),
            }
        )
    return result
