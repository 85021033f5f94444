"""Passes over the layers in plain PyTorch whose scores need only squares, for `launch.bench`."""

import time
from typing import Any

import numpy as np

from launch.benchmarks.solvers import Task
from launch.benchmarks.torch_solvers import (
    Calls,
    Show,
    add_squares,
    layer_by_layer,
    linears_of,
    run_layer,
    sum_of_losses,
    torch_layers,
)


def time_wanda(task: Task, _: str) -> float:
    """Return the seconds of Wanda: each layer run dense, masked, and run again.

    Source: Sun et al. 2024, eq. 1.

    Args:
      task: The work.
    """
    return layer_by_layer(task, _wanda_layer)


def _wanda_layer(layer: Any, calls: Calls, sparsity: float) -> Calls:
    """Prune a layer by Wanda, in place, and return its masked outputs."""
    import torch

    linears = linears_of(layer)
    squares = [torch.zeros(m.in_features) for m in linears]
    run_layer(layer, linears, [add_squares(total) for total in squares], calls)
    for m, total in zip(linears, squares, strict=True):
        order = (m.weight.abs() * total.sqrt()).sort(dim=1, stable=True)[1]
        m.weight.scatter_(1, order[:, : int(sparsity * order.shape[1])], 0.0)
    return run_layer(layer, [], [], calls)


def time_dense_statistics(task: Task, _: str) -> float:
    """Return the seconds of one dense pass that sums up what scores of units are made of.

    That is most of LLMRank's and FLAP's work: sums and squares of the channels that enter every
    linear. Their selection takes no time beside it and is left out.

    Args:
      task: The work.
    """
    return layer_by_layer(task, _sums_of_layer)


def _sums_of_layer(layer: Any, calls: Calls, _: float) -> Calls:
    import torch

    linears = linears_of(layer)
    sums = [torch.zeros(2, m.in_features) for m in linears]

    def add(total: Any) -> Show:
        return lambda x: total.add_(torch.stack([x.sum(dim=0), x.square().sum(dim=0)]))

    return run_layer(layer, linears, [add(total) for total in sums], calls)


def time_perplexity(task: Task, _: str) -> float:
    """Return the seconds of the perplexity of all windows, one at a time.

    Args:
      task: The work.
    """
    import torch

    model, _ = torch_layers(task)
    start = time.perf_counter()
    with torch.no_grad():
        sum_of_losses(model, torch.tensor(task.tokens.astype(np.int64)))
    return time.perf_counter() - start
