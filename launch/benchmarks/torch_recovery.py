"""Both recoveries in plain PyTorch, for `launch.bench`: the same steps on the same windows."""

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from launch.benchmarks.solvers import Task
from launch.benchmarks.torch_solvers import (
    Calls,
    first_calls,
    hidden,
    linears_of,
    run_layer,
    torch_layers,
)
from pruning.recovery import blocks, distill_training
from pruning.recovery.adamw_core import BETAS, WARM_UP
from pruning.recovery.distill import RATES
from pruning.recovery.distill_core import CLIP

BATCH = blocks.Blocks.batch
BLOCK_RATE, MODEL_RATE = blocks.Blocks.lr, RATES["full"]


def time_blocks(task: Task, steps: str) -> float:
    """Return the seconds of AdamW on each layer towards the dense layer's outputs.

    The last layer goes towards the dense model's distributions, as in ours.

    Source: Guo et al. 2024 (EBFT), algorithm 1.

    Args:
      task: The work.
      steps: Updates of each layer.
    """
    import torch

    model, layers = torch_layers(task)
    originals = copy.deepcopy(layers)
    for layer in layers:
        _mask_smallest(layer, task.sparsity)
    start = time.perf_counter()
    with torch.no_grad():
        tokens = torch.tensor(task.tokens.astype(np.int64))
        dense = _batches(first_calls(model, layers[0], tokens))
    pruned = dense
    for layer, original in zip(layers, originals, strict=True):
        with torch.no_grad():
            dense = run_layer(original, [], [], dense)
        head = _head_of(model) if layer is layers[-1] else None
        _train_layer(layer, pruned, dense, int(steps), head)
        with torch.no_grad():
            pruned = run_layer(layer, [], [], pruned)
    return time.perf_counter() - start


def time_distill(task: Task, steps: str) -> float:
    """Return the seconds of AdamW on the model towards the dense model's distributions.

    Source: Hinton et al. 2015.

    Args:
      task: The work.
      steps: Updates.
    """
    import torch

    model, layers = torch_layers(task)
    model.get_decoder().layers = layers
    teacher = copy.deepcopy(model)
    for layer in layers:
        _mask_smallest(layer, task.sparsity)
    windows = torch.tensor(task.tokens.astype(np.int64)).split(BATCH)
    train = _count_training(len(windows))
    start = time.perf_counter()
    optimizer = _Masked(model, MODEL_RATE, int(steps))
    every = math.ceil(int(steps) / distill_training.EVALUATIONS)
    for k in range(int(steps)):
        _divergence(model, teacher, windows[k % train]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if k % every == 0:
            with torch.no_grad():
                for x in windows[train:]:
                    float(_divergence(model, teacher, x))
    return time.perf_counter() - start


def _count_training(batches: int) -> int:
    """Return how many of the batches updates see; the rest is held out."""
    return batches - max(1, round(blocks.HELD_OUT * batches))


def _mask_smallest(layer: Any, sparsity: float) -> None:
    """Set the smallest weights of every row to zero."""
    import torch

    with torch.no_grad():
        for m in linears_of(layer):
            order = m.weight.abs().argsort(dim=1)
            m.weight.scatter_(1, order[:, : int(sparsity * order.shape[1])], 0.0)


def _batches(calls: Calls) -> Calls:
    """Join the windows of an update; what goes with them serves every window."""
    import torch

    xs, kwargs = [x for x, _ in calls], calls[0][1]
    return [(torch.cat(xs[k : k + BATCH]), kwargs) for k in range(0, len(xs), BATCH)]


class _Masked:
    """AdamW whose updates leave zeros as they are.

    Args:
      module: What is trained.
      rate: Largest learning rate.
      steps: Number of updates.
    """

    def __init__(self, module: Any, rate: float, steps: int) -> None:
        import torch

        self._params = list(module.parameters())
        self._masks = [x != 0 for x in self._params]
        self._adam = torch.optim.AdamW(self._params, lr=rate, betas=BETAS, weight_decay=0.0)
        rising = max(1, round(WARM_UP * steps))

        def share(step: int) -> float:
            falling = (steps - step) / max(1, steps - rising)
            return min((step + 1) / rising, falling)

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, share)

    def step(self) -> None:
        """Update by the gradients that are there, and remove them."""
        for x, mask in zip(self._params, self._masks, strict=True):
            x.grad.mul_(mask)
        self._adam.step()
        self._schedule.step()
        self._adam.zero_grad()


def _head_of(model: Any) -> Callable[[Any], Any]:
    """Return the function from states behind the last layer to log-probabilities."""
    decoder = model.get_decoder()
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layer_norm
    head = model.get_output_embeddings()
    for part in (norm, head):
        part.requires_grad_(False)
    return lambda x: head(norm(x)).log_softmax(-1)


def _train_layer(
    layer: Any, inputs: Calls, targets: Calls, steps: int, head: Callable[[Any], Any] | None
) -> None:
    """Train a layer on its inputs towards targets, in place; the best held-out step is kept.

    With a head the divergence of the distributions behind the layer is trained on.
    """
    import torch

    def loss(k: int) -> Any:
        (x, kwargs), target = inputs[k], targets[k][0]
        y = hidden(layer(x, **kwargs))
        if head:
            return _mean_divergence(head(y), head(target))
        errors = (y - target).square().sum(-1)
        return (errors / (target.square().sum(-1) + errors)).mean()

    train, every = _count_training(len(inputs)), math.ceil(steps / blocks.EVALUATIONS)
    rate = BLOCK_RATE * (blocks.LOGITS_RATE if head else 1.0)
    optimizer = _Masked(layer, rate, steps)
    best, kept = math.inf, copy.deepcopy(layer.state_dict())
    for k in range(steps + 1):
        if k % every == 0 or k == steps:
            with torch.no_grad():
                now = sum(float(loss(i)) for i in range(train, len(inputs)))
            if now < best:
                best, kept = now, copy.deepcopy(layer.state_dict())
        if k < steps:
            loss(k % train).backward()
            optimizer.step()
    layer.load_state_dict(kept)


def _divergence(model: Any, teacher: Any, tokens: Any) -> Any:
    """Return the mean divergence of a model's distributions from a teacher's."""
    import torch

    with torch.no_grad():
        wanted = teacher(tokens, use_cache=False).logits.log_softmax(-1)
    return _mean_divergence(model(tokens, use_cache=False).logits.log_softmax(-1), wanted)


def _mean_divergence(logs: Any, wanted: Any) -> Any:
    """Return the mean divergence of log-probabilities from wanted ones."""
    import torch

    divergence = torch.nn.functional.kl_div(logs, wanted, log_target=True, reduction="sum")
    return divergence / wanted.shape[:-1].numel()
