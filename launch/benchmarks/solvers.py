"""Whole runs for `launch.bench`, each in its own process: ours, and SparseGPT, SparseLLM, SLEB, NeuroAL's search plainly in PyTorch."""

import contextlib
import multiprocessing
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from eval.size import peak_memory

DAMP, COLUMNS = 0.01, 128  # SparseGPT's, as its authors have them
ITERATIONS, PENALTY, RATE = 4, 5.0, 0.01  # SparseLLM's for LLaMA, likewise
TRIALS = 14 + 15  # values of lambda that NeuroAL's authors try, blocks and rows


class Run(NamedTuple):
    """Seconds of a run (from the loaded model to the last pruned block), and the peak memory of its process in bytes if it had its own."""

    seconds: float
    peak: int | None


class Task(NamedTuple):
    """What every run of a comparison shares: the checkpoint's directory, windows int [n t], and how many blocks are pruned (0: all)."""

    directory: pathlib.Path
    tokens: np.ndarray
    sparsity: float
    batch: int
    blocks: int


def topiary(task: Task, method: str) -> float:
    """Seconds of one of our methods, compilation included."""
    import jax

    from calibration.runtime import Runtime
    from launch.flags import calls
    from models.checkpoint.reader import in_memory, open_checkpoint
    from pruning.methods import METHODS
    from pruning.types import Request, prune

    model = in_memory(open_checkpoint(task.directory).model)
    model = model._replace(blocks=model.blocks[: task.blocks or None])
    start = time.perf_counter()
    made = calls.build("method", method, METHODS)
    jax.block_until_ready(
        prune(model, made, task.tokens, Request(task.sparsity), Runtime(task.batch))[0].blocks
    )
    return time.perf_counter() - start


def search(task: Task, allocation: str) -> float:
    """Seconds of one of our allocators with Wanda, until the first block is pruned with what it found; compilation included."""
    import jax

    from calibration.runtime import Runtime
    from launch.flags import calls
    from models.checkpoint.reader import in_memory, open_checkpoint
    from pruning.methods import ALLOCATIONS, METHODS
    from pruning.types import Request, prune

    model = in_memory(open_checkpoint(task.directory).model)
    model = jax.block_until_ready(model._replace(blocks=model.blocks[: task.blocks or None]))
    start, found = time.perf_counter(), 0.0

    def stage(what: str, steps: int) -> Callable[[], None]:
        nonlocal found
        found = time.perf_counter() - start
        return lambda: None

    request = Request(task.sparsity, allocation=calls.build("allocation", allocation, ALLOCATIONS))
    runtime = Runtime(task.batch, progress=stage)
    # The pruning is a stage of its own, which begins last.
    prune(model, METHODS["wanda"](), task.tokens, request, runtime)
    return found


Calls = list[
    tuple[Any, dict[str, Any]]
]  # what a layer of PyTorch's is called with, a window at a time


def plain_search(task: Task, argument: str) -> float:
    """Seconds of as many trials as NeuroAL's authors make, one after the other: each block dense, masked by Wanda and run again."""
    import torch

    model, layers = _torch_layers(task)
    start = time.perf_counter()
    with torch.no_grad():
        first = _first_inputs(model, layers[0], torch.tensor(task.tokens.astype(np.int64)))
        for _ in range(TRIALS):
            calls = first
            for layer in layers:
                linears = _linears(layer)
                weights = [m.weight.clone() for m in linears]
                dense, sparse = ([torch.zeros(m.in_features) for m in linears] for _ in range(2))
                _run(layer, linears, [_add_squares(a) for a in dense], calls)
                for m, w, squares in zip(linears, weights, dense, strict=True):
                    order = (w.abs() * squares.sqrt()).sort(dim=1, stable=True)[1]
                    counts = (
                        torch.linspace(task.sparsity - 0.01, task.sparsity + 0.01, len(w))
                        * w.shape[1]
                    )
                    gone = torch.arange(w.shape[1])[None, :] < counts[:, None]
                    m.weight[torch.zeros_like(gone).scatter_(1, order, gone)] = 0
                calls = _run(layer, linears, [_add_squares(a) for a in sparse], calls)
                sum(
                    float((a / a.sum() - b / b.sum()).norm()) / len(a)
                    for a, b in zip(dense, sparse, strict=True)
                )
                for m, w in zip(linears, weights, strict=True):
                    m.weight.copy_(w)
    return time.perf_counter() - start


def plain_sparsegpt(task: Task, _: str) -> float:
    """Seconds of SparseGPT (Frantar & Alistarh 2023, Algorithm 1) in PyTorch: a Hessian a linear, a window at a time."""
    return _layer_by_layer(task, solved)


def plain_alternation(task: Task, _: str) -> float:
    """Seconds of SparseLLM (Bai et al. 2024, Algorithm 1) for gated feed-forward parts in PyTorch, by pseudo-inverses as released."""
    return _layer_by_layer(task, alternated)


def _layer_by_layer(task: Task, prune: Callable[[Any, Calls, float], Calls]) -> float:
    """Seconds of a walk in which each layer is pruned, and gives the next one its calls."""
    import torch

    model, layers = _torch_layers(task)
    start = time.perf_counter()
    with torch.no_grad():
        calls = _first_inputs(model, layers[0], torch.tensor(task.tokens.astype(np.int64)))
        for layer in layers:
            calls = prune(layer, calls, task.sparsity)
    return time.perf_counter() - start


def solved(layer: Any, calls: Calls, sparsity: float) -> Calls:
    """A layer pruned by SparseGPT: what it then gives for each window, to call the next one with."""
    for m, h in _hessians(layer, calls, {}).items():
        _solve(m, h, sparsity)
    return _run(layer, [], [], calls)


def alternated(layer: Any, calls: Calls, sparsity: float) -> Calls:
    """A layer of LLaMA's pruned by SparseLLM: what it then gives for each window, to call the next one with."""
    import torch

    ffn = up, gate, down = layer.mlp.up_proj, layer.mlp.gate_proj, layer.mlp.down_proj
    read: dict[Any, list[Any]] = {up: [], down: []}
    hessians = _hessians(layer, calls, {m: own.append for m, own in read.items()})
    for m, h in hessians.items():
        if m not in ffn:
            _solve(m, h, sparsity)
    x, p = (torch.cat(own) for own in read.values())
    y, z, s = down(p), up(x), gate(x)
    x_inverse = torch.linalg.pinv(x, rtol=1e-15)
    for k in range(ITERATIONS):
        if k:
            up.weight.copy_((x_inverse @ z).T)
            gate.weight.copy_((x_inverse @ s).T)
            down.weight.copy_((torch.linalg.pinv(p, rtol=1e-15) @ y).T)
            hessians[down] = (2 / len(calls)) * p.T @ p
        for m in ffn:  # each damps its H again, as released
            _solve(m, hessians[m], sparsity)
        w, act = down.weight, torch.nn.functional.silu(s)
        p = (y @ w + act * z) @ torch.linalg.inv(w.T @ w + torch.eye(w.shape[1]))
        z = (up(x) + act * p) / (act**2 + 1)
        m = gate(x)
        for _ in range(2):
            on = torch.sigmoid(s)
            slope = on * (1 + s * (1 - on))
            s = s - 2 * PENALTY * RATE * (s - m - (p - s * on * z) * z * slope)
    return _run(layer, [], [], calls)


def plain_removal(task: Task, _: str) -> float:
    """Seconds of SLEB (Song et al. 2024, Algorithm 1) in PyTorch."""
    model, layers = _torch_layers(task)
    start = time.perf_counter()
    removed(model, list(layers), task.tokens, round(task.sparsity * len(layers)))
    return time.perf_counter() - start


def removed(model: Any, layers: list[Any], tokens: np.ndarray, n: int) -> list[int]:
    """The layers that SLEB removes, in order: the loss of every candidate by a whole forward of what is left, a window at a time. All but
    the first and the last are candidates."""
    import torch

    decoder, left, order = model.get_decoder(), list(range(len(layers))), []
    windows = torch.tensor(tokens.astype(np.int64))

    def loss(stack: list[int]) -> float:
        decoder.layers = torch.nn.ModuleList([layers[i] for i in stack])
        rows = (model(row[None], use_cache=False).logits[0, :-1] for row in windows)
        return sum(
            float(torch.nn.functional.cross_entropy(x, row[1:]))
            for x, row in zip(rows, windows, strict=True)
        )

    with torch.no_grad():
        for _ in range(n):
            losses = {i: loss([j for j in left if j != i]) for i in left if 0 < i < len(layers) - 1}
            order.append(min(losses, key=losses.__getitem__))
            left.remove(order[-1])
    return order


def _torch_layers(task: Task) -> tuple[Any, Any]:
    """The task's model in PyTorch, and those of its layers that are pruned."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(task.directory, dtype=torch.float32).eval()
    return model, model.get_decoder().layers[: task.blocks or None]


def _linears(layer: Any) -> list[Any]:
    import torch

    return [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]


def _run(layer: Any, linears: list[Any], see: list[Callable[[Any], Any]], calls: Calls) -> Calls:
    """What the layer gives for each window, to call the next one with; each linear's inputs [tokens in] are shown to its `see`."""

    def hook(show: Callable[[Any], Any]) -> Callable[[Any, tuple[Any, ...]], None]:
        def shown(
            module: Any, args: tuple[Any, ...]
        ) -> None:  # what a hook returns would take the input's place
            show(args[0].reshape(-1, args[0].shape[-1]))

        return shown

    hooks = [m.register_forward_pre_hook(hook(show)) for m, show in zip(linears, see, strict=True)]
    outputs = [(_hidden(layer(x, **kwargs)), kwargs) for x, kwargs in calls]
    for handle in hooks:
        handle.remove()
    return outputs


def _hessians(layer: Any, calls: Calls, see: dict[Any, Callable[[Any], Any]]) -> dict[Any, Any]:
    """SparseGPT's H [in in] of every linear of the dense layer; inputs of those in `see` are shown to it too."""
    import torch

    found = {m: torch.zeros(m.in_features, m.in_features) for m in _linears(layer)}
    adding = [_add_outer_products(h, len(calls)) for h in found.values()]
    _run(layer, [*found, *see], [*adding, *see.values()], calls)
    return found


def _solve(m: Any, h: Any, sparsity: float) -> None:
    """Prune a linear by its H, which is left damped."""
    m.weight.copy_(_sweep(m.weight.clone(), h, sparsity))


def _add_squares(total: Any) -> Callable[[Any], Any]:
    return lambda x: total.add_(x.norm(dim=0) ** 2)


def _add_outer_products(h: Any, samples: int) -> Callable[[Any], Any]:
    return lambda x: h.add_(x.T @ x, alpha=2 / samples)


def _hidden(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _first_inputs(model: Any, layer: Any, tokens: Any) -> Calls:
    """What the first layer is called with, a window at a time."""

    class Reached(Exception):
        pass

    found: Calls = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.pop("hidden_states")
        found.append((x, dict(kwargs)))
        raise Reached

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    for row in tokens:
        with contextlib.suppress(Reached):
            model(row[None], use_cache=False)
    hook.remove()
    return found


def _sweep(w: Any, h: Any, sparsity: float) -> Any:
    """W [out in] pruned column after column."""
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
        gone = score <= threshold
        for i in range(b - a):
            column = part[:, i].clone()
            kept = torch.where(gone[:, i], 0.0, column)
            errors[:, i] = (column - kept) / corner[i, i]
            part[:, i:] -= torch.outer(errors[:, i], corner[i, i:])
            w[:, a + i] = kept
        w[:, b:] -= errors @ u[a:b, b:]
    return w


def _child(program: Callable[[Task, str], float], task: Task, argument: str, out: Any) -> None:
    seconds = program(task, argument)
    out.put(Run(seconds, peak_memory(())["host"]))


def alone(program: Callable[[Task, str], float], task: Task, argument: str = "") -> Run:
    """The program in a fresh process, so that neither compilations nor memory carry over."""
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    process = context.Process(target=_child, args=(program, task, argument, out))
    process.start()
    try:
        process.join()
    finally:
        process.terminate()  # of a benchmark that was itself ended; else there is nothing left to do
    if process.exitcode:
        raise RuntimeError(f"a benchmark's process ended with {process.exitcode}")
    return out.get()
