"""Train a small language model on generated stories: how `embedded:tiny-llama` and `embedded:tiny-opt` were made.

    python -m launch.pretrain --flagfile=configs/pretrain-llama.flags

The result is a Hugging Face checkpoint with its own tokenizer. The same settings give the same bytes on the same machine.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from calibration.data import evaluation_tokens
from calibration.stories import generator as stories
from eval.perplexity import perplexity
from launch.flags import cli
from launch.run.staging import check_free, staged
from models import init
from models.arch import Arch, Model, logits
from models.checkpoint import writer
from models.errors import InputError
from models.families import hf

PAD, END = (
    "<pad>",
    "</s>",
)  # tokens 0 and 1; as in OPT, the tokenizer puts END before a text, so it parts stories and ends them
LEAST_VOCABULARY = 258  # every byte and the two special tokens
TOKENIZER_STORIES = 4000  # enough that every word of the grammar occurs
STORIES_A_READ = 256  # how many stories are tokenized at a time

Params = Any  # (ends, blocks) of a Model
Step = Callable[[Params, optax.OptState, jax.Array], tuple[Params, optax.OptState, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a run depends on, as the flags of the same names say."""

    family: str
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    length: int
    batch: int
    steps: int
    warmup: int
    learning_rate: float
    weight_decay: float
    clip: float
    eval_windows: int
    log_every: int
    seed: int


def options() -> cli.Flags:
    """The command's flags, with the defaults of `Settings`' fields."""
    f = cli.Flags("launch.pretrain", str(__doc__))
    f.string("output", None, "directory of the trained model")
    f.integer("seed", 0, "of the parameters, and of the stories to learn from")
    f.integer("log_every", 100, "steps between two lines of progress", least=1)
    f.group("Model")
    f.choice("family", "llama", ("llama", "opt"), "architecture")
    f.integer("hidden", 128, "channels of the residual stream", least=1)
    f.integer("blocks", 6, "decoder blocks", least=1)
    f.integer("heads", 4, "query heads of a block", least=1)
    f.integer("kv_heads", 0, "key-value heads of a block of llama; 0: as many as query heads")
    f.integer("ffn", 352, "neurons of a block's feed-forward part", least=1)
    f.integer("vocabulary", 1024, "most tokens of the tokenizer", least=LEAST_VOCABULARY)
    f.integer("length", 256, "tokens of a window, and most positions of the model", least=2)
    f.group("Training")
    f.integer("steps", 1500, "optimizer steps", least=1)
    f.integer("warmup", 100, "steps in which the rate rises, fewer than steps")
    f.integer("batch", 8, "windows a step", least=1)
    f.number("learning_rate", 3e-3, "AdamW's highest rate; a cosine takes it down to a tenth")
    f.number("weight_decay", 0.1, "AdamW's decay of matrices; norms and biases do not decay")
    f.number("clip", 1.0, "greatest norm of the gradient")
    f.integer("eval_windows", 64, "windows of the closing perplexity", least=1)
    return f


def train_tokenizer(vocabulary: int, seed: int) -> tokenizers.Tokenizer:
    """Byte-level BPE (Radford et al. 2019, section 2.2) of at most `vocabulary` tokens, learnt from train stories."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 1)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        itertools.islice(stories.stream("train", seed), TOKENIZER_STORIES), trainer
    )
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path, length: int) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` by which `transformers.AutoTokenizer` reads it."""
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
    tokenizer: tokenizers.Tokenizer, split: stories.Split, seed: int, shape: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Endless int32 tokens [batch length]: the split's stories, END before each, in one row after the other without a gap."""
    source, left = stories.stream(split, seed), np.zeros(0, np.int32)
    while True:
        read = tokenizer.encode_batch_fast(list(itertools.islice(source, STORIES_A_READ)))
        tokens = np.concatenate([left, *(np.array(story.ids, np.int32) for story in read)])
        whole = len(tokens) - len(tokens) % math.prod(shape)
        yield from tokens[:whole].reshape(-1, *shape)
        left = tokens[whole:]


def model_config(s: Settings, vocabulary: int) -> dict[str, Any]:
    """The Hugging Face configuration of a model to train, for `models.families.hf` and for the checkpoint's `config.json`."""
    shared = {
        "vocab_size": vocabulary,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.blocks,
        "num_attention_heads": s.heads,
        "max_position_embeddings": s.length,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": "float16",
    }
    if s.family == "llama":
        own = {
            "intermediate_size": s.ffn,
            "num_key_value_heads": s.kv_heads or s.heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
        }
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shared, **own}
    own = {
        "ffn_dim": s.ffn,
        "word_embed_proj_dim": s.hidden,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "dropout": 0.0,
        "tie_word_embeddings": True,
        "init_std": 0.02,
    }
    return {"architectures": ["OPTForCausalLM"], "model_type": "opt", **shared, **own}


def loss(model: Model, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats, over the length-1 predicted positions of tokens int [batch length]."""
    predicted = logits(model, tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(predicted, tokens[:, 1:]).mean()


def make_optimizer(s: Settings) -> optax.GradientTransformation:
    """AdamW on clipped gradients, linear warm-up, cosine decay to a tenth; matrices alone decay, not norms and biases."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, s.learning_rate, s.warmup, s.steps, end_value=s.learning_rate / 10
    )
    adamw = optax.adamw(
        rate,
        b2=0.99,
        weight_decay=s.weight_decay,
        mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p),
    )
    return optax.chain(optax.clip_by_global_norm(s.clip), adamw)


def make_step(arch: Arch, optimizer: optax.GradientTransformation) -> Step:
    """The jitted step (params, state, tokens [batch length]) -> (params, state, loss before the step)."""

    def step(
        params: Params, state: optax.OptState, tokens: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(lambda p: loss(Model(arch, *p), tokens))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def train(s: Settings, config: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> Model:
    """Train a model from random parameters (float32), printing loss and speed on the way."""
    arch, non_block, blocks = init.init_model(config, jax.random.key(s.seed))
    params, optimizer = (non_block, blocks), make_optimizer(s)
    state, step = optimizer.init(params), make_step(arch, optimizer)
    start = time.monotonic()
    data = batches(tokenizer, "train", s.seed, (s.batch, s.length))
    for i, tokens in enumerate(itertools.islice(data, s.steps), 1):
        params, state, value = step(params, state, jnp.asarray(tokens))
        if i == 1 or i % s.log_every == 0 or i == s.steps:
            print(
                f"step {i}/{s.steps}  loss {value:.4f}  {(time.monotonic() - start) / i:.3f} s/step",
                flush=True,
            )
    return Model(arch, *params)


def held_out(model: Model, tokenizer: tokenizers.Tokenizer, s: Settings) -> float:
    """Perplexity on `embedded` evaluation data, as `launch.evaluate` measures it."""

    def encode(text: str, special: bool = False) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=special).ids

    vocabulary = tokenizer.get_vocab_size()
    windows = evaluation_tokens(
        "embedded", lambda: encode, length=s.length, windows=s.eval_windows, vocab=vocabulary
    )
    return perplexity(model, windows.ids).value


def check(s: Settings, output: pathlib.Path) -> None:
    """InputError for what no flag can check by itself."""
    check_free(output, "config.json")
    if s.warmup >= s.steps:
        raise InputError(
            f"--warmup={s.warmup} leaves none of the {s.steps} steps to train: make it smaller"
        )
    if s.family == "opt" and s.kv_heads:
        raise InputError(
            "--kv_heads is for --family=llama: every head of OPT has its own keys and values, leave it out"
        )
    if not (s.learning_rate > 0 and s.weight_decay >= 0 and s.clip > 0):
        raise InputError(
            "--learning_rate and --clip must be positive, and --weight_decay positive or 0"
        )
    hf.specs(model_config(s, s.vocabulary))


def pretrain(s: Settings, output: pathlib.Path) -> float:
    """Train tokenizer and model, write the checkpoint (float16), which appears at `output` only when complete.

    Returns the perplexity of the stored parameters on the evaluation split. InputError when `output` is taken or settings disagree.
    """
    check(s, output)
    tokenizer = train_tokenizer(s.vocabulary, s.seed)
    config = model_config(s, tokenizer.get_vocab_size())
    model = train(s, config, tokenizer)
    stored = Model(model.arch, *jax.tree.map(lambda a: a.astype(jnp.float16), model[1:]))
    result = held_out(
        Model(model.arch, *jax.tree.map(lambda a: a.astype(jnp.float32), stored[1:])), tokenizer, s
    )
    print(f"perplexity on {s.eval_windows} windows of the evaluation split: {result:.4f}")
    with staged(output, "config.json") as directory, tempfile.TemporaryDirectory() as companions:
        save_tokenizer(tokenizer, pathlib.Path(companions), s.length)
        writer.save(directory, stored, config, pathlib.Path(companions))
    return result


def main(values: dict[str, Any]) -> None:
    """Run with the parsed flags."""
    if values["output"] is None:
        raise InputError("--output is missing: name the directory to write the model to")
    pretrain(cli.frozen(Settings, values), pathlib.Path(values["output"]).expanduser())


if __name__ == "__main__":
    sys.exit(cli.run(options(), main))
