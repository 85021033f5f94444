"""SparseGPT, SparseLLM, SLEB and NeuroAL's search in plain PyTorch, for `launch.bench`."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from launch.benchmarks.solvers import Task

# SparseGPT, authors' settings: relative damping, columns of a block.
DAMP, COLUMNS = 0.01, 128
# SparseLLM, authors' settings for LLaMA: iterations, penalty, step size of s.
ITERATIONS, PENALTY, RATE = 4, 5.0, 0.01
# NeuroAL: values of lambda that its authors try, for blocks and for rows.
TRIALS = 14 + 15

# Arguments of a layer's forward, one window at a time: (hidden states [1 time dim], kwargs).
Calls = list[tuple[Any, dict[str, Any]]]
# Receives inputs of a linear [tokens in].
Show = Callable[[Any], Any]


def time_neuroal_trials(task: Task, _: str) -> float:
    """Return the seconds of NeuroAL's trials, one by one.

    A trial runs each block dense, masks it by Wanda, and runs it again.

    Args:
      task: The work.
    """
    import torch

    model, layers = torch_layers(task)
    start = time.perf_counter()
    with torch.no_grad():
        first = first_calls(model, layers[0], torch.tensor(task.tokens.astype(np.int64)))
        for _trial in range(TRIALS):
            calls = first
            for layer in layers:
                calls = _neuroal_block(layer, calls, task.sparsity)
    return time.perf_counter() - start


def _neuroal_block(layer: Any, calls: Calls, sparsity: float) -> Calls:
    """Measure the misalignment of a masked layer, restore it, and return its masked outputs."""
    import torch

    linears = linears_of(layer)
    weights = [m.weight.clone() for m in linears]
    dense = [torch.zeros(m.in_features) for m in linears]
    sparse = [torch.zeros(m.in_features) for m in linears]
    run_layer(layer, linears, [add_squares(total) for total in dense], calls)
    for m, w, squares in zip(linears, weights, dense, strict=True):
        order = (w.abs() * squares.sqrt()).sort(dim=1, stable=True)[1]
        counts = torch.linspace(sparsity - 0.01, sparsity + 0.01, len(w)) * w.shape[1]
        dropped = torch.arange(w.shape[1])[None, :] < counts[:, None]
        m.weight[torch.zeros_like(dropped).scatter_(1, order, dropped)] = 0
    outputs = run_layer(layer, linears, [add_squares(total) for total in sparse], calls)
    # The trial's score; nothing depends on it here, but it is part of the work.
    sum(
        float((a / a.sum() - b / b.sum()).norm()) / len(a)
        for a, b in zip(dense, sparse, strict=True)
    )
    for m, w in zip(linears, weights, strict=True):
        m.weight.copy_(w)
    return outputs


def time_sparsegpt(task: Task, _: str) -> float:
    """Return the seconds of SparseGPT: a Hessian per linear, a window at a time.

    Source: Frantar & Alistarh 2023, Algorithm 1.

    Args:
      task: The work.
    """
    return layer_by_layer(task, sparsegpt_layer)


def time_sparsellm(task: Task, _: str) -> float:
    """Return the seconds of SparseLLM for gated feed-forward parts, by pseudo-inverses.

    Source: Bai et al. 2024, Algorithm 1, as in the official code.

    Args:
      task: The work.
    """
    return layer_by_layer(task, sparsellm_layer)


def layer_by_layer(task: Task, prune: Callable[[Any, Calls, float], Calls]) -> float:
    """Return the seconds of pruning each layer on the outputs of the pruned layers before it.

    Args:
      task: The work.
      prune: (layer, its arguments, sparsity) -> arguments of the next layer.
    """
    import torch

    model, layers = torch_layers(task)
    start = time.perf_counter()
    with torch.no_grad():
        calls = first_calls(model, layers[0], torch.tensor(task.tokens.astype(np.int64)))
        for layer in layers:
            calls = prune(layer, calls, task.sparsity)
    return time.perf_counter() - start


def sparsegpt_layer(layer: Any, calls: Calls, sparsity: float) -> Calls:
    """Prune a layer by SparseGPT, in place.

    Args:
      layer: The layer.
      calls: Its arguments.
      sparsity: Fraction to remove.

    Returns:
      The arguments of the next layer.
    """
    for m, h in _hessians(layer, calls, {}).items():
        _solve(m, h, sparsity)
    return run_layer(layer, [], [], calls)


def sparsellm_layer(layer: Any, calls: Calls, sparsity: float) -> Calls:
    """Prune a LLaMA layer by SparseLLM, in place.

    Args:
      layer: The layer.
      calls: Its arguments.
      sparsity: Fraction to remove.

    Returns:
      The arguments of the next layer.
    """
    import torch

    up, gate, down = layer.mlp.up_proj, layer.mlp.gate_proj, layer.mlp.down_proj
    read: dict[Any, list[Any]] = {up: [], down: []}
    hessians = _hessians(layer, calls, {m: inputs.append for m, inputs in read.items()})
    for m, h in hessians.items():
        if m not in (up, gate, down):
            _solve(m, h, sparsity)
    x, p = torch.cat(read[up]), torch.cat(read[down])
    y, z, s = down(p), up(x), gate(x)
    x_inverse = torch.linalg.pinv(x, rtol=1e-15)
    for k in range(ITERATIONS):
        if k:
            up.weight.copy_((x_inverse @ z).T)
            gate.weight.copy_((x_inverse @ s).T)
            down.weight.copy_((torch.linalg.pinv(p, rtol=1e-15) @ y).T)
            hessians[down] = (2 / len(calls)) * p.T @ p
        for m in (up, gate, down):  # each iteration damps its H again, as in the official code
            _solve(m, hessians[m], sparsity)
        w, act = down.weight, torch.nn.functional.silu(s)
        p = (y @ w + act * z) @ torch.linalg.inv(w.T @ w + torch.eye(w.shape[1]))
        z = (up(x) + act * p) / (act**2 + 1)
        m = gate(x)
        for _ in range(2):
            on = torch.sigmoid(s)
            slope = on * (1 + s * (1 - on))
            s = s - 2 * PENALTY * RATE * (s - m - (p - s * on * z) * z * slope)
    return run_layer(layer, [], [], calls)


def time_sleb(task: Task, _: str) -> float:
    """Return the seconds of SLEB.

    Source: Song et al. 2024, Algorithm 1.

    Args:
      task: The work.
    """
    model, layers = torch_layers(task)
    start = time.perf_counter()
    sleb_removal_order(model, list(layers), task.tokens, round(task.sparsity * len(layers)))
    return time.perf_counter() - start


def sleb_removal_order(model: Any, layers: list[Any], tokens: np.ndarray, n: int) -> list[int]:
    """Return the layers that SLEB removes, in order.

    The loss of a candidate is a whole forward pass without it, a window at a time. All layers but
    the first and the last are candidates.

    Args:
      model: The model in PyTorch.
      layers: Its layers.
      tokens: Calibration windows, int [samples time].
      n: Number of layers to remove.
    """
    import torch

    decoder, left, order = model.get_decoder(), list(range(len(layers))), []
    windows = torch.tensor(tokens.astype(np.int64))

    def loss(stack: list[int]) -> float:
        decoder.layers = torch.nn.ModuleList([layers[i] for i in stack])
        return sum_of_losses(model, windows)

    with torch.no_grad():
        for _ in range(n):
            losses = {i: loss([j for j in left if j != i]) for i in left if 0 < i < len(layers) - 1}
            order.append(min(losses, key=losses.__getitem__))
            left.remove(order[-1])
    return order


def sum_of_losses(model: Any, windows: Any) -> float:
    """Return the sum of the windows' mean cross-entropies, run one at a time.

    Args:
      model: The model in PyTorch.
      windows: Tokens, int [samples time].
    """
    import torch

    total = 0.0
    for row in windows:
        logits = model(row[None], use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, row[1:]))
    return total


def torch_layers(task: Task) -> tuple[Any, Any]:
    """Return the task's model in PyTorch, and its layers to prune."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(task.directory, dtype=torch.float32).eval()
    return model, model.get_decoder().layers[: task.blocks or None]


def linears_of(layer: Any) -> list[Any]:
    """Return the linears of a layer, in order."""
    import torch

    return [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]


def run_layer(layer: Any, linears: list[Any], shows: list[Show], calls: Calls) -> Calls:
    """Run a layer on its arguments and return those of the next; show each linear's inputs.

    Args:
      layer: The layer.
      linears: Linears to watch.
      shows: What takes the inputs [tokens in] of each.
      calls: The layer's arguments.
    """

    def hook(show: Show) -> Callable[[Any, tuple[Any, ...]], None]:
        # A value returned from a hook would replace the input, so it must return None.
        def show_input(module: Any, args: tuple[Any, ...]) -> None:
            show(args[0].reshape(-1, args[0].shape[-1]))

        return show_input

    hooks = [m.register_forward_pre_hook(hook(s)) for m, s in zip(linears, shows, strict=True)]
    outputs = [(hidden(layer(x, **kwargs)), kwargs) for x, kwargs in calls]
    for handle in hooks:
        handle.remove()
    return outputs


def _hessians(layer: Any, calls: Calls, shows: dict[Any, Show]) -> dict[Any, Any]:
    """Return SparseGPT's H [in in] of every linear of a dense layer, showing some their inputs."""
    import torch

    hessians = {m: torch.zeros(m.in_features, m.in_features) for m in linears_of(layer)}
    adding = [_add_outer_products(h, len(calls)) for h in hessians.values()]
    run_layer(layer, [*hessians, *shows], [*adding, *shows.values()], calls)
    return hessians


def _solve(m: Any, h: Any, sparsity: float) -> None:
    """Prune a linear by its H, which is damped in place."""
    m.weight.copy_(sparsegpt_sweep(m.weight.clone(), h, sparsity))


def add_squares(total: Any) -> Show:
    """Return what adds the squares of a linear's inputs to a total [in]."""
    return lambda x: total.add_(x.norm(dim=0) ** 2)


def _add_outer_products(h: Any, samples: int) -> Show:
    return lambda x: h.add_(x.T @ x, alpha=2 / samples)


def hidden(out: Any) -> Any:
    """Return the hidden states of a layer's output, a tuple in older versions of transformers."""
    return out[0] if isinstance(out, tuple) else out


def first_calls(model: Any, layer: Any, tokens: Any) -> Calls:
    """Return the arguments of the first layer, a window at a time."""

    class ReachedError(Exception):
        pass

    calls: Calls = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.pop("hidden_states")
        calls.append((x, dict(kwargs)))
        raise ReachedError

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    for row in tokens:
        with contextlib.suppress(ReachedError):
            model(row[None], use_cache=False)
    hook.remove()
    return calls


def sparsegpt_sweep(w: Any, h: Any, sparsity: float) -> Any:
    """Prune the columns of a matrix from left to right.

    Args:
      w: Weights, [out in]; changed in place.
      h: Hessian, [in in]; damped in place.
      sparsity: Fraction to remove.

    Returns:
      The pruned weights, [out in].
    """
    import torch

    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead], w[:, dead] = 1, 0
    diagonal += DAMP * diagonal.mean()
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for a in range(0, w.shape[1], COLUMNS):
        b = min(a + COLUMNS, w.shape[1])
        part, corner, errors = w[:, a:b].clone(), u[a:b, a:b], torch.zeros(w.shape[0], b - a)
        score = part**2 / corner.diagonal() ** 2
        threshold = score.flatten().sort()[0][int(score.numel() * sparsity)]
        dropped = score <= threshold
        for i in range(b - a):
            column = part[:, i].clone()
            kept = torch.where(dropped[:, i], 0.0, column)
            errors[:, i] = (column - kept) / corner[i, i]
            part[:, i:] -= torch.outer(errors[:, i], corner[i, i:])
            w[:, a + i] = kept
        w[:, b:] -= errors @ u[a:b, b:]
    return w
