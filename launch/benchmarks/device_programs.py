"""Programs of one block that `launch.bench --what=device` times, on random weights and tokens.

Operations are those of matrix products, counted in the traced program with every loop as often as
it runs (`models.costs.flops`); where a comment gives a formula, they are counted by it.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Gram, outer_products
from calibration.runtime import Runtime
from models.arch import Block, Model, linear_of
from models.costs import Cost, flops, read_cost
from models.init import init_model
from models.published import MODELS
from pruning.structured.sleb_paths import Candidate, whole_path
from pruning.structured.sleb_runner import Runner
from pruning.weights import admm, admm_core, patterns, sparsegpt, sparsegpt_core
from pruning.weights.sparsellm import CORRECTED, RIDGE
from pruning.weights.sparsellm_block import ffn_of
from pruning.weights.sparsellm_core import Counts, Settings
from pruning.weights.sparsellm_corrected_core import solve_corrected
from pruning.weights.sparsellm_solvers_core import by_sparsegpt

SPARSITY = 0.5
HIGHEST = "float32, highest"  # name of the peak of products in float32 throughout


class Shape(NamedTuple):
    """Shape of a model and of the windows that its block sees.

    Attributes:
      config: Contents of its `config.json`.
      batch: Windows at a time.
      length: Tokens in a window.
    """

    config: Mapping[str, Any]
    batch: int
    length: int


def _llama(dim: int, ffn: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    """Return the configuration of a LLaMA model with one block."""
    return {
        **MODELS["LLaMA-2-7B"].config,
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


SHAPES = {
    "tiny": Shape(_llama(128, 256, 4, 2, 1024), 4, 128),
    "160m": Shape(_llama(768, 3072, 12, 12, 32000), 2, 256),
    "1b": Shape(_llama(2048, 5632, 32, 4, 32000), 8, 2048),  # TinyLlama
    "7b": Shape(_llama(4096, 11008, 32, 32, 32000), 8, 2048),  # LLaMA-2
}


class Work(NamedTuple):
    """A program to time.

    Attributes:
      name: What it does.
      peak: Name of the peak that it is compared with.
      run: Does the work once, and waits for it.
      flops: Floating-point operations of its matrix products.
      moved: Bytes that it moves, as XLA counts them (loops once); None if unknown.
      memory: Bytes that it takes beside its arguments, as a plan says; None if unknown.
    """

    name: str
    peak: str
    run: Callable[[], Any]
    flops: float
    moved: float | None = None
    memory: int | None = None


def compiled(name: str, peak: str, function: Callable[..., Any], *args: Any) -> Work:
    """Compile a function for its arguments.

    Args:
      name: What it does.
      peak: Name of the peak that it is compared with.
      function: Pure function.
      args: Arrays.
    """
    traced = jax.jit(function).trace(*args)
    begin = time.perf_counter()
    program = traced.lower().compile()
    cost: Cost = read_cost(program, flops(traced.jaxpr.jaxpr), time.perf_counter() - begin)
    own = cost.memory - program.memory_analysis().argument_size_in_bytes
    run = lambda: jax.block_until_ready(program(*args))  # noqa: E731
    return Work(name, peak, run, cost.flops, cost.bytes or None, own)


class Inputs:
    """Random weights of one block with its inputs, each made when it is first needed.

    Attributes:
      shape: Shape of the model and of its windows.
      model: The model, with one block.
    """

    def __init__(self, shape: Shape, dtype: str) -> None:
        """Draw the weights.

        Args:
          shape: Shape of the model.
          dtype: Type of weights and activations.
        """
        self.shape = shape
        config = {**shape.config, "num_hidden_layers": 1}
        self.model: Model = init_model(config, jax.random.key(0), jnp.dtype(dtype))
        self._dtype = jnp.dtype(dtype)

    @property
    def block(self) -> Block:
        """Return the block."""
        return self.model.blocks[0]

    def activations(self, channels: int, seed: int) -> jax.Array:
        """Return random activations [b t channels]."""
        shape = (self.shape.batch, self.shape.length, channels)
        return jax.random.normal(jax.random.key(seed), shape, self._dtype)

    @functools.cached_property
    def x(self) -> jax.Array:
        """Input of the block, [b t d]."""
        return self.activations(self.shape.config["hidden_size"], 1)

    @functools.cached_property
    def hidden(self) -> jax.Array:
        """Input of its last linear, [b t f]."""
        return self.activations(self.shape.config["intermediate_size"], 2)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Windows, int32 [b t]."""
        size = (self.shape.batch, self.shape.length)
        return np.random.default_rng(0).integers(0, self.shape.config["vocab_size"], size, np.int32)


def of_types(dtype: str, inputs: Inputs) -> Iterator[Work]:
    """Compile what runs in the model's type: the block, Gram matrices, and a candidate of SLEB.

    Args:
      dtype: Name of the type.
      inputs: Weights and activations in it.
    """
    arch, block = inputs.model.arch, inputs.block
    yield compiled("forward", dtype, lambda p, x: arch.block(p, x)[0], block, inputs.x)
    # bfloat16 is multiplied as it is, float32 always in float32.
    peak = HIGHEST if dtype == "float32" else dtype
    for x in (inputs.x, inputs.hidden):
        yield compiled(f"Gram of {x.shape[-1]}", peak, outer_products, x)
    yield _sleb(dtype, inputs)


def _sleb(dtype: str, inputs: Inputs) -> Work:
    """Return the trial of one candidate, as the search runs it: one block, then the loss."""
    config, tokens = inputs.shape.config, inputs.tokens
    no_stores = (0, 0, 0)
    runner = Runner(inputs.model, tokens, Runtime(inputs.shape.batch), no_stores)
    candidate = Candidate(whole_path(1), 1)
    arch = inputs.model.arch
    traced = jax.jit(lambda p, x: arch.block(p, x)[0]).trace(inputs.block, inputs.x)
    # A product of every predicted position with every row of the head. The logit of the next token
    # takes one row more.
    positions = tokens.shape[0] * (tokens.shape[1] - 1)
    head = 2.0 * positions * (config["vocab_size"] + 1) * config["hidden_size"]
    work = flops(traced.jaxpr.jaxpr) + head
    return Work("SLEB, a candidate", dtype, lambda: list(runner.loss_bounds(candidate)), work)


def _counts(pattern: Any, *ws: jax.Array) -> list[jax.Array]:
    """Return how many entries go from each matrix."""
    return [jnp.asarray(pattern.counts(w.shape, np.float64(SPARSITY))) for w in ws]


def solvers(inputs: Inputs) -> Iterator[Work]:
    """Compile what solves for weights, always in float32.

    Args:
      inputs: Weights and activations in float32.
    """
    up, gate, down = (linear_of(inputs.block, name).w for name in ("up", "gate", "down"))
    by_columns = patterns.per_column_block(sparsegpt_core.COLUMNS)
    rule = sparsegpt.pruner(sparsegpt.DAMP, by_columns)
    rows = admm.rounds(patterns.per_row)
    gram = jax.jit(outer_products)
    for x, ws in ((inputs.x, (gate, up)), (inputs.hidden, (down,))):
        width, total = x.shape[-1], gram(x)
        h = sparsegpt_core.hessian(Gram(total, jnp.asarray(float(len(x)))))
        factor = functools.partial(sparsegpt_core.factor, damp=sparsegpt.DAMP)
        yield compiled(f"factor of {width}", HIGHEST, factor, h)
        factored = jax.block_until_ready(jax.jit(factor)(h))
        names = "gate, up" if len(ws) > 1 else "down"
        counts = _counts(by_columns, *ws)
        yield compiled(f"SparseGPT, {names}", HIGHEST, rule.solve, ws, factored, counts)
        if len(ws) > 1:
            prepare = functools.partial(admm_core.prepare, damp=admm.DAMP)
            yield compiled(f"ADMM, inverse of {width}", HIGHEST, prepare, total)
            system = jax.jit(prepare)(total)
            solve = functools.partial(admm_core.solve, s=rows)
            counts = _counts(patterns.per_row, *ws)
            yield compiled(f"ADMM, {names}", HIGHEST, solve, ws, system, counts)
    yield _sparsellm(inputs)


def _sparsellm(inputs: Inputs) -> Work:
    """Return SparseLLM's solution of the feed-forward part: the solver, then one round."""
    pattern = patterns.per_column_block(sparsegpt_core.COLUMNS)
    solver = by_sparsegpt(sparsegpt.DAMP, RIDGE, pattern)
    iterations = 2  # the first is the solver alone
    settings = Settings(
        inputs.model.arch.config.act, pattern, sparsegpt.DAMP, solver, CORRECTED, iterations
    )
    ffn = ffn_of(inputs.model.arch, inputs.block)
    y = inputs.activations(inputs.x.shape[-1], 3)
    counts = Counts(
        tuple(_counts(pattern, *(p.w for p in ffn.writers))), *_counts(pattern, ffn.w2.w)
    )
    function = functools.partial(solve_corrected, c=settings)
    name = f"SparseLLM, {iterations} iterations"
    return compiled(name, HIGHEST, function, ffn, (inputs.x[None],), (y[None],), counts)
