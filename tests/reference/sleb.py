"""SLEB as a plain search over deep random models, in float64 from whole forwards."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Model, logits
from models.families import hf
from reference import small

LENGTH, WINDOWS = 12, 6
TOKENS = small.tokens(WINDOWS, LENGTH)


@functools.cache
def deep(family: str, blocks: int = 8) -> Model:
    """Return a random model of many blocks, scaled so that they matter differently."""
    arch, non_block, specs = hf.specs(small.CONFIGS[family] | {"num_hidden_layers": blocks})
    rng = np.random.default_rng(3)

    def draw(spec: hf.Spec, scale: float = 0.3) -> jax.Array:
        return jnp.asarray(
            (spec.init == "ones") + scale * rng.standard_normal(spec.shape), jnp.float32
        )

    def tree(specs: Any, scale: float) -> Any:
        return jax.tree.map(lambda s: draw(s, scale), specs, is_leaf=hf.is_spec)

    return Model(
        arch,
        tree(non_block, 0.3),
        tuple(
            tree(s, scale) for s, scale in zip(specs, rng.uniform(0.1, 0.35, blocks), strict=True)
        ),
    )


def loss(m: Model, blocks: Sequence[Any]) -> float:
    """Return the official loss of the model with these blocks, from its logits, in float64."""
    z = np.asarray(logits(m._replace(blocks=tuple(blocks)), TOKENS), np.float64)[:, :-1]
    z -= z.max(axis=-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return (
        -float(np.take_along_axis(log_p, TOKENS[:, 1:, None], axis=2).mean(axis=1).sum()) * LENGTH
    )


def plain_search(
    m: Model, n: int, early: int = 1, latter: int = 1
) -> tuple[list[int], list[dict[int, float]], int]:
    """Run every candidate whole; return the order, the losses and the blocks times windows run."""
    alive = list(range(len(m.blocks)))
    order: list[int] = []
    phases: list[dict[int, float]] = []
    work = 0
    for _ in range(n):
        losses = {}
        for j in range(early, len(alive) - latter):
            left = alive[:j] + alive[j + 1 :]
            losses[alive[j]] = loss(m, [m.blocks[i] for i in left])
            work += len(left) * WINDOWS
        order.append(min(losses, key=lambda i: (losses[i], i)))
        alive.remove(order[-1])
        phases.append(losses)
    return order, phases, work
