"""Programs that `launch.bench --what=speed` times: ours, PyTorch's, and the device's peak."""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from eval.size import count_entries
from launch.flags.dtypes import DTYPES
from models.arch import Model
from models.checkpoint.reader import in_memory, open_checkpoint
from models.host_memory import keep_freed_memory

# Our names of XLA's costs of a compiled program.
XLA_COSTS = {"flops": "flops", "bytes": "bytes accessed"}


class Task(NamedTuple):
    """Work of a process.

    Attributes:
      directory: Hugging Face directory of the model.
      dtype: Name of the model's type.
      batch: Prompts at a time.
      prompt: Tokens of a prompt.
      new_tokens: Tokens to generate after each prompt.
    """

    directory: pathlib.Path
    dtype: str
    batch: int
    prompt: int
    new_tokens: int


class Times(NamedTuple):
    """Seconds of one run.

    Attributes:
      prompt: From the prompts to the logits of the first new token.
      generation: For the tokens after the first.
    """

    prompt: float
    generation: float


Facts = dict[str, Any]
# A task -> (a function that does the work once, facts about the program).
Program = Callable[[Task], tuple[Callable[[], Times], Facts]]


def topiary(task: Task) -> tuple[Callable[[], Times], Facts]:
    """Read a model and compile our prefill and decode programs.

    Args:
      task: The work.

    Returns:
      As `compiled`.
    """
    keep_freed_memory()  # as every command does
    model = in_memory(open_checkpoint(task.directory, DTYPES[task.dtype]).model)
    return compiled(model, task.batch, task.prompt, task.new_tokens)


def compiled(
    model: Model, batch: int, prompt: int, new_tokens: int
) -> tuple[Callable[[], Times], Facts]:
    """Compile our prefill and decode programs of a model.

    Args:
      model: Model in memory.
      batch: Prompts at a time.
      prompt: Tokens of a prompt.
      new_tokens: Tokens to generate after each prompt.

    Returns:
      A function that runs them once; the number of parameters, and the FLOPs and bytes of the
      prompt and of one token as XLA counts them.
    """
    import jax
    import jax.numpy as jnp

    from models.generate import decode, prefill

    arch, non_block, blocks = model._replace(blocks=tuple(model.blocks))
    prompts = jnp.asarray(_prompts(batch, prompt, arch.config.vocab), jnp.int32)
    start, no_eos = jnp.int32(prompt), jnp.zeros((0,), jnp.int32)
    lowered = prefill.lower(arch, non_block, blocks, prompts, prompt + new_tokens)
    first = lowered.compile()
    rest = decode.lower(
        arch, non_block, blocks, *lowered.out_info, start, new_tokens, None, no_eos
    ).compile()

    def once() -> Times:
        begin = time.perf_counter()
        state = jax.block_until_ready(first(non_block, blocks, prompts))
        middle = time.perf_counter()
        jax.block_until_ready(rest(non_block, blocks, *state, start, None, no_eos))
        return Times(middle - begin, time.perf_counter() - middle)

    # XLA does not know how often the loop of `decode` runs, and counts its body once: one token.
    costs = {"prompt": first.cost_analysis() or {}, "token": rest.cost_analysis() or {}}
    facts: Facts = {"parameters": count_entries((non_block, blocks))}
    for name, key in XLA_COSTS.items():
        facts[name] = {part: cost.get(key) for part, cost in costs.items()}
    return once, facts


def pytorch(task: Task) -> tuple[Callable[[], Times], Facts]:
    """Load the model in PyTorch, with the cache and attention of transformers.

    Args:
      task: The work.

    Returns:
      A function that does the work once; the number of parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, task.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(task.directory, dtype=dtype).eval()
    prompts = torch.from_numpy(_prompts(task.batch, task.prompt, model.config.vocab_size))

    @torch.no_grad()
    def once() -> Times:
        begin = time.perf_counter()
        out = model(prompts, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(task.new_tokens - 1):
            token = out.logits[:, -1].argmax(-1)
            out = model(token[:, None], past_key_values=out.past_key_values, use_cache=True)
        return Times(middle - begin, time.perf_counter() - middle)

    return once, {"parameters": sum(p.numel() for p in model.parameters())}


def matmul_peak(task: Task) -> tuple[Callable[[], Times], Facts]:
    """Measure the device's peak with a large matrix product in the task's type.

    Args:
      task: Names the type.

    Returns:
      A function that does nothing; the FLOPs per second of the best of a few products.
    """
    from eval.peak import flops_per_second

    return lambda: Times(0.0, 0.0), {"flops_per_second": flops_per_second(DTYPES[task.dtype])}


def _prompts(batch: int, prompt: int, vocab: int) -> np.ndarray:
    """Return random prompts, int64 [batch time]; only their shape affects the time."""
    return np.random.default_rng(0).integers(0, vocab, (batch, prompt))
