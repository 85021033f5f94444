"""Recovery against which the code is compared: AdamW in float64, and inputs from small models."""

import pathlib
from typing import Any

import numpy as np

from calibration.runtime import Runtime
from models.arch import Block, Model
from pruning.methods import METHODS
from pruning.recovery.types import Recovered, Recovery, RecoveryInputs
from pruning.types import Request, prune
from reference import small


def pruned_by(
    dense: Model, method: str, sparsity: float, pattern: Any = None, **arguments: Any
) -> tuple[Model, tuple[int, ...]]:
    """Return the pruned model and the index of each of its blocks in the dense one."""
    request = Request(sparsity, pattern)
    model, outcome = prune(
        dense, METHODS[method](**arguments), small.tokens(), request, Runtime(batch=2)
    )
    return model, outcome.kept_blocks or tuple(range(len(dense.blocks)))


def inputs_of(
    dense: Model, pruned: Model, kept: tuple[int, ...], samples: int = 8, length: int = 12
) -> RecoveryInputs:
    """Return what a recovery reads, with random windows."""
    windows = small.tokens(samples, length, seed=1)
    return RecoveryInputs(
        pruned,
        dense,
        kept,
        windows,
        lambda n: small.tokens(n, length, seed=2),
        pathlib.Path("unused"),
    )


def recover(
    recovery: Recovery,
    inputs: RecoveryInputs,
    runtime: Runtime = Runtime(),  # noqa: B008, frozen
) -> tuple[Model, Recovered]:
    """Return the recovered model in memory, and what the report says of it."""
    blocks: dict[int, Block] = {}
    result = recovery.run(inputs, runtime, blocks.__setitem__)
    kept = tuple(blocks[j] for j in range(len(blocks)))
    non_block = result.non_block or inputs.pruned.non_block
    return inputs.pruned._replace(non_block=non_block, blocks=kept), result


def adamw(
    w: np.ndarray,
    gradient_of: Any,
    rates: list[float],
    decay: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
) -> np.ndarray:
    """Return a matrix after steps of AdamW on its nonzero entries, in float64.

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    w = w.astype(np.float64)
    mask = w != 0
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, rate in enumerate(rates, 1):
        g = gradient_of(w) * mask
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w = w - rate * (m_hat / (np.sqrt(v_hat) + eps) + decay * w)
    return w
