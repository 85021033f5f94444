"""ADMM with the targets of the block in plain PyTorch, for `launch.bench`."""

from collections.abc import Callable
from typing import Any

from launch.benchmarks.solvers import Task
from launch.benchmarks.torch_solvers import Calls, layer_by_layer, run_layer

DAMP, ITERATIONS, SELECTIONS = 0.3, 20, 15


def time_admm(task: Task, _: str) -> float:
    """Return the seconds of ADMM for LLaMA layers, each solved toward its dense outputs in turn.

    Args:
      task: The work.
    """
    return layer_by_layer(task, admm_layer)


def admm_layer(layer: Any, calls: Calls, sparsity: float) -> Calls:
    """Prune a LLaMA layer, in place.

    Args:
      layer: The layer.
      calls: Its arguments.
      sparsity: Fraction to remove.

    Returns:
      The arguments of the next layer.
    """
    attention, mlp = layer.self_attn, layer.mlp
    stages = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    linears = [m for stage in stages for m in stage]
    dense = _activations(layer, linears, calls)
    for stage in stages:
        now = _activations(layer, linears, calls)
        x = now[stage[0]][0]
        gram = x.T @ x
        for m in stage:
            target = dense[m][1]
            if m is mlp.down_proj:
                target = target + dense[attention.o_proj][1] - now[attention.o_proj][1]
            m.weight.copy_(admm(m.weight.clone(), gram, (target - now[m][1]).T @ x, sparsity))
    return run_layer(layer, [], [], calls)


def _activations(layer: Any, linears: list[Any], calls: Calls) -> dict[Any, tuple[Any, Any]]:
    """Return inputs and outputs [tokens channels] of every linear."""
    import torch

    read: dict[Any, list[Any]] = {m: [] for m in linears}

    def show(m: Any) -> Callable[[Any], Any]:
        return read[m].append

    run_layer(layer, linears, [show(m) for m in linears], calls)
    inputs = {m: torch.cat(xs) for m, xs in read.items()}
    return {m: (x, m(x)) for m, x in inputs.items()}


def admm(w: Any, gram: Any, cross: Any, sparsity: float) -> Any:
    """Prune a matrix by row.

    Source: Boža 2024, gradual pruning.

    Args:
      w: Weights, [out in].
      gram: X^T X [in in].
      cross: R^T X [out in], where R is what the dense linear leaves of its target.
      sparsity: Fraction to remove.

    Returns:
      The pruned weights, [out in].
    """
    import torch

    norms = gram.diagonal().sqrt() + 1e-8
    h = gram / norms[:, None] / norms[None, :]
    h.diagonal().add_(DAMP * h.diagonal().mean())
    dense = w * norms
    wanted = dense @ h + cross / norms
    h.diagonal().add_(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    v, total = dense, int(w.shape[1] * sparsity)
    for t in range(ITERATIONS):
        if t < SELECTIONS:
            removed = int(total * (1 - (1 - (t + 1) / SELECTIONS) ** 3))
            gone = torch.zeros_like(v, dtype=torch.bool)
            gone.scatter_(1, v.abs().topk(removed, dim=1, largest=False).indices, True)
        kept, rest = v.masked_fill(gone, 0), v.masked_fill(~gone, 0)
        v = (wanted + kept - rest) @ inverse + rest
    return v.masked_fill(gone, 0) / norms
