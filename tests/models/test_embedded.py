"""The embedded models are whole, small, made by our configs, and trained well enough to prune."""

import jax.numpy as jnp
import pytest
import tokenizers

from calibration.data import evaluation_tokens
from calibration.stories.tokens import train_tokenizer
from calibration.tokenizer import load_tokenizer
from eval.perplexity import perplexity
from models.arch import Model, logits
from models.checkpoint import hub
from models.checkpoint import reader as store

pytestmark = pytest.mark.slow

BOUNDS = {"tiny-llama": 2.1, "tiny-opt": 2.1}  # perplexity on 16 windows of the evaluation split


class Embedded:
    """An embedded model in memory, its windows of evaluation data and its perplexity on them."""

    def __init__(self, name: str):
        self.name, self.directory = name, hub.resolve(f"embedded:{name}")
        self.checkpoint = store.open_checkpoint(self.directory)
        self.model = store.in_memory(self.checkpoint.model)
        vocab = self.checkpoint.config["vocab_size"]
        self.windows = evaluation_tokens(
            "embedded", lambda: load_tokenizer(self.directory), length=256, windows=16, vocab=vocab
        ).ids
        self.dense = self.perplexity(self.model)

    def perplexity(self, model: Model) -> float:
        return perplexity(model, self.windows, batch=16).value


@pytest.fixture(scope="module", params=list(BOUNDS))
def embedded(request: pytest.FixtureRequest) -> Embedded:
    return Embedded(request.param)


def test_the_files_are_whole_and_small(embedded: Embedded) -> None:
    files = {file.name: file.stat().st_size for file in embedded.directory.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 4e6


def test_the_shapes_are_those_of_the_documentation(embedded: Embedded) -> None:
    """Six blocks, and grouped-query attention in the LLaMA, as tests and documentation assume."""
    config = embedded.checkpoint.config
    assert config["num_hidden_layers"] == len(embedded.model.blocks) == 6
    if embedded.name == "tiny-llama":
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    else:
        assert config["activation_function"] == "relu" and config["do_layer_norm_before"]


def test_perplexity_is_below_its_bound(embedded: Embedded) -> None:
    assert 1.2 < embedded.dense < BOUNDS[embedded.name]


def test_tokenizer_is_the_one_the_grammar_gives(embedded: Embedded) -> None:
    """So the checkpoint can be made again: other stories would need a new training run."""
    shipped = tokenizers.Tokenizer.from_file(str(embedded.directory / "tokenizer.json"))
    assert shipped.get_vocab() == train_tokenizer(1024, seed=0).get_vocab()
    assert shipped.get_vocab_size() == embedded.checkpoint.config["vocab_size"] == 1024


def test_no_block_is_free(embedded: Embedded) -> None:
    """Dropping any one block costs something, so that the depth search has something to find."""
    blocks = embedded.model.blocks
    without = [
        embedded.perplexity(embedded.model._replace(blocks=blocks[:i] + blocks[i + 1 :]))
        for i in range(len(blocks))
    ]
    assert min(without) > 1.02 * embedded.dense
    assert max(without) > 1.5 * min(without)


CONTINUED = {
    'Mia was a brave girl who lived in a small village. "Let us play hide and': " seek",
    (
        "Mia was a brave girl who lived in a small village. "
        'Mia closed her eyes and counted. "One, two, three,'
    ): " four",
    "They met a little bird in front of its": " nest",
    "They met a little dog in front of its": " kennel",
}


def test_it_continues_a_story(embedded: Embedded) -> None:
    """Greedy text makes sense: fixed phrases, counting, and which home belongs to which animal."""
    tokenizer = tokenizers.Tokenizer.from_file(str(embedded.directory / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in CONTINUED]
    longest = max(map(len, prompts))
    padded = jnp.asarray(
        [ids + [0] * (longest - len(ids)) for ids in prompts]
    )  # attention is causal: what follows is not seen
    best = logits(embedded.model, padded).argmax(-1)
    said = [int(best[i, len(ids) - 1]) for i, ids in enumerate(prompts)]
    # A rare word is several tokens, of which the first is predicted here.
    assert said == [
        tokenizer.encode(word, add_special_tokens=False).ids[0] for word in CONTINUED.values()
    ]


def test_removing_neurons_costs_more_the_more_are_removed(embedded: Embedded) -> None:
    """Zero the 30 and 60 % of neurons with the smallest weights."""
    rising = [
        embedded.dense,
        *(embedded.perplexity(without_neurons(embedded.model, share)) for share in (0.3, 0.6)),
    ]
    assert rising[1] > 1.05 * rising[0] and rising[2] > 1.3 * rising[1]


def without_neurons(model: Model, share: float) -> Model:
    blocks = []
    for block in model.blocks:
        reader = model.arch.group("neurons").reader.name
        linear = getattr(block, reader)
        size = jnp.linalg.norm(linear.w, axis=0)
        for writer in model.arch.group("neurons").writers:
            size = size * jnp.linalg.norm(getattr(block, writer.name).w, axis=1)
        alive = (jnp.argsort(jnp.argsort(size)) >= int(share * size.size)).astype(jnp.float32)
        blocks.append(block.replace(**{reader: linear.replace(w=linear.w * alive[None, :])}))
    return model._replace(blocks=tuple(blocks))
