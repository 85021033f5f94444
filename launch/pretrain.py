"""Train a small language model on generated stories.

    python -m launch.pretrain --flagfile=configs/pretrain-llama.flags

This made `embedded:tiny-llama` and `embedded:tiny-opt`. The result is a Hugging Face checkpoint
with its own tokenizer. The same settings give the same bytes on the same machine.
"""

import dataclasses
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tokenizers

from calibration.data import evaluation_tokens
from calibration.stories.tokens import LEAST_VOCABULARY, batches, save_tokenizer, train_tokenizer
from eval.perplexity import perplexity
from launch.flags import cli
from launch.flags.common import compilation_flag
from launch.run.places import check_free
from launch.run.staging import staged
from models import init
from models.arch import Arch, Block, Model, NonBlockParams, logits
from models.checkpoint import writer
from models.errors import InputError
from models.families import hf

Params = tuple[NonBlockParams, Sequence[Block]]
Step = Callable[[Params, optax.OptState, jax.Array], tuple[Params, optax.OptState, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings that a run depends on, named as their flags."""

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
    """Return the flags of `launch.pretrain`."""
    f = cli.Flags("launch.pretrain", str(__doc__))
    f.string("output", None, "directory of the trained model")
    f.integer("seed", 0, "seed of the parameters and of the stories to train on")
    f.integer("log_every", 100, "steps between two lines of progress", least=1)
    compilation_flag(f)
    f.group("Model")
    f.choice("family", "llama", ("llama", "opt"), "architecture")
    f.integer("hidden", 128, "channels of the residual stream", least=1)
    f.integer("blocks", 6, "decoder blocks", least=1)
    f.integer("heads", 4, "query heads of a block", least=1)
    f.integer("kv_heads", 0, "key-value heads of a block, llama only; 0: as many as query heads")
    f.integer("ffn", 352, "neurons of a block's feed-forward part", least=1)
    f.integer("vocabulary", 1024, "most tokens of the tokenizer", least=LEAST_VOCABULARY)
    f.integer("length", 256, "tokens in a window, and positions of the model", least=2)
    f.group("Training")
    f.integer("steps", 1500, "optimizer steps", least=1)
    f.integer("warmup", 100, "steps in which the learning rate rises; fewer than steps")
    f.integer("batch", 8, "windows in a step", least=1)
    f.number("learning_rate", 3e-3, "highest rate of AdamW; it falls to a tenth as a cosine")
    f.number("weight_decay", 0.1, "weight decay of matrices; norms and biases do not decay")
    f.number("clip", 1.0, "greatest norm of the gradient")
    f.integer("eval_windows", 64, "windows of the perplexity at the end", least=1)
    return f


def model_config(s: Settings, vocabulary: int) -> dict[str, Any]:
    """Return the Hugging Face configuration of the model to train.

    Args:
      s: Settings.
      vocabulary: Tokens of the tokenizer.
    """
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
    """Compute the mean cross-entropy over the length-1 predicted positions.

    Args:
      model: The model.
      tokens: Token ids, int [batch length].

    Returns:
      The mean in nats, [].
    """
    predicted = logits(model, tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(predicted, tokens[:, 1:]).mean()


def make_optimizer(s: Settings) -> optax.GradientTransformation:
    """Return AdamW on clipped gradients, with linear warm-up and cosine decay to a tenth."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, s.learning_rate, s.warmup, s.steps, end_value=s.learning_rate / 10
    )
    adamw = optax.adamw(
        rate,
        b2=0.99,
        weight_decay=s.weight_decay,
        # Norms and biases do not decay.
        mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p),
    )
    return optax.chain(optax.clip_by_global_norm(s.clip), adamw)


def make_step(arch: Arch, optimizer: optax.GradientTransformation) -> Step:
    """Return the jitted training step.

    Args:
      arch: The model's architecture.
      optimizer: The optimizer.

    Returns:
      A function (params, state, tokens int [batch length]) -> (params, state, loss before the
      step); it donates params and state.
    """

    def step(
        params: Params, state: optax.OptState, tokens: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(lambda p: loss(Model(arch, *p), tokens))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def train(s: Settings, config: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> Model:
    """Train a model from random parameters, and print loss and speed on the way.

    Args:
      s: Settings.
      config: Hugging Face configuration of the model.
      tokenizer: The tokenizer.

    Returns:
      The trained model, float32.
    """
    arch, non_block, blocks = init.init_model(config, jax.random.key(s.seed))
    params: Params = (non_block, blocks)
    optimizer = make_optimizer(s)
    state = optimizer.init(params)
    step = make_step(arch, optimizer)
    start = time.monotonic()
    data = batches(tokenizer, "train", s.seed, (s.batch, s.length))
    for i, tokens in enumerate(itertools.islice(data, s.steps), 1):
        params, state, value = step(params, state, jnp.asarray(tokens))
        if i == 1 or i % s.log_every == 0 or i == s.steps:
            pace = (time.monotonic() - start) / i
            print(f"step {i}/{s.steps}  loss {value:.4f}  {pace:.3f} s/step", flush=True)
    return Model(arch, *params)


def held_out_perplexity(model: Model, tokenizer: tokenizers.Tokenizer, s: Settings) -> float:
    """Measure perplexity on the `embedded` evaluation data, as `launch.evaluate` does.

    Args:
      model: The model.
      tokenizer: Its tokenizer.
      s: Settings.

    Returns:
      The perplexity.
    """

    def encode(text: str, special: bool = False) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=special).ids

    vocabulary = tokenizer.get_vocab_size()
    windows = evaluation_tokens(
        "embedded", lambda: encode, length=s.length, windows=s.eval_windows, vocab=vocabulary
    )
    return perplexity(model, windows.ids).value


def check(s: Settings, output: pathlib.Path) -> None:
    """Check the settings that no flag can check by itself.

    Args:
      s: Settings.
      output: Directory of the checkpoint.

    Raises:
      InputError: The output is in use, a number is out of range, or settings disagree.
    """
    check_free(output, "config.json")
    if s.warmup >= s.steps:
        raise InputError(
            f"leaves none of the {s.steps} steps to train",
            "make it smaller",
            field="warmup",
            value=s.warmup,
        )
    if s.family == "opt" and s.kv_heads:
        raise InputError(
            "is for `family`=llama",
            "leave it out, as every head of OPT has its own keys and values",
            field="kv_heads",
            value=s.kv_heads,
        )
    for name in ("learning_rate", "clip"):
        if not getattr(s, name) > 0:
            raise InputError("must be positive", field=name, value=getattr(s, name))
    if not s.weight_decay >= 0:
        raise InputError("must be positive or 0", field="weight_decay", value=s.weight_decay)
    hf.specs(model_config(s, s.vocabulary))  # raises for widths that no model can have


def pretrain(s: Settings, output: pathlib.Path) -> float:
    """Train tokenizer and model, and write the checkpoint in float16.

    Args:
      s: Settings.
      output: Directory of the checkpoint, which appears when it is complete.

    Returns:
      Perplexity of the stored parameters on the evaluation split.

    Raises:
      InputError: As `check` raises.
    """
    check(s, output)
    tokenizer = train_tokenizer(s.vocabulary, s.seed)
    config = model_config(s, tokenizer.get_vocab_size())
    model = train(s, config, tokenizer)
    # The perplexity is that of the rounded parameters, which users will load.
    stored = _cast(model, jnp.float16)
    perplexity_at_end = held_out_perplexity(_cast(stored, jnp.float32), tokenizer, s)
    print(
        f"perplexity on {s.eval_windows} windows of the evaluation split: {perplexity_at_end:.4f}"
    )
    with staged(output, "config.json") as stage, tempfile.TemporaryDirectory() as companions:
        save_tokenizer(tokenizer, pathlib.Path(companions), s.length)
        writer.save(stage.result, stored, config, pathlib.Path(companions))
    return perplexity_at_end


def _cast(model: Model, dtype: Any) -> Model:
    """Convert all parameters to a type."""
    return Model(model.arch, *jax.tree.map(lambda a: a.astype(dtype), model[1:]))


def main(values: dict[str, Any]) -> None:
    """Run the command with the values of its flags."""
    if values["output"] is None:
        raise InputError("is missing", "name the directory to write the model to", field="output")
    pretrain(cli.frozen(Settings, values), pathlib.Path(values["output"]).expanduser())


if __name__ == "__main__":
    sys.exit(cli.run(options(), main))
