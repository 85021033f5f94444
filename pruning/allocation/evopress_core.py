"""EvoPress (Sieberling et al. 2025), maths: levels of sparsity, their mutation, and the fitness.

A unit is a linear or a block. At level 0 it loses what an even budget takes; each level more takes
the same number of weights, whatever the unit. A mutation raises one unit and lowers another, so
the number of weights that are removed never changes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["linear", "block"]
MOST_SWITCHES = 3  # of levels in one mutation


class Unit(NamedTuple):
    """Linears whose sparsity changes together.

    Attributes:
      block: Index of their block.
      steps: Slot -> entries of each row between one level and the next.
      weights: Weights between one level and the next, of all slots.
      low: Lowest level that it can take.
      high: Highest level.
    """

    block: int
    steps: Mapping[str, int]
    weights: int
    low: int
    high: int


def _steps_of_linears(
    shapes: Sequence[Mapping[str, tuple[int, int]]], step: float
) -> dict[tuple[int, int], int]:
    """Return the entries of each row between two levels, by shape of a linear.

    All linears step by the same number of weights: a multiple of all numbers of rows, about `step`
    of a linear of mean size. Where that is more than twice as many, as of widths that share no
    factor, those of the same number of rows step alike.
    """
    sizes = [out * inputs for block in shapes for out, inputs in block.values()]
    kinds = {shape for block in shapes for shape in block.values()}
    aim = step * sum(sizes) / len(sizes)
    common = math.lcm(*(out for out, _ in kinds))
    if common <= 2 * aim:
        weights = common * max(1, round(aim / common))
        return {shape: weights // shape[0] for shape in kinds}
    return {shape: max(1, round(aim / shape[0])) for shape in kinds}


def make_units(
    shapes: Sequence[Mapping[str, tuple[int, int]]],
    counts: Sequence[Mapping[str, int]],
    kind: Kind,
    step: float,
    levels: int,
) -> list[Unit]:
    """Return the units of a model.

    Args:
      shapes: By block: slot -> (out, in).
      counts: By block: slot -> entries of each row that level 0 removes.
      kind: "linear", or "block" for all linears of a block together.
      step: Share of a linear between one level and the next, about.
      levels: Most levels up or down.
    """
    steps_of = _steps_of_linears(shapes, step)
    units = []
    for i, block in enumerate(shapes):
        if kind == "block":
            parts = [{slot: max(1, round(step * inputs)) for slot, (_, inputs) in block.items()}]
        else:
            parts = [{slot: steps_of[shape]} for slot, shape in block.items()]
        for steps in parts:
            # A row keeps an entry at least.
            room = [(block[slot][1] - 1 - counts[i][slot]) // n for slot, n in steps.items()]
            used = [counts[i][slot] // n for slot, n in steps.items()]
            weights = sum(block[slot][0] * n for slot, n in steps.items())
            units.append(Unit(i, steps, weights, -min(levels, *used), min(levels, *room)))
    return units


def draw_switches(rng: np.random.Generator) -> int:
    """Return the number of switches of a mutation: the fewer of two draws from one to three.

    Source: Sieberling et al. 2025, section 3.2.

    Args:
      rng: Source of what is random.
    """
    return int(rng.integers(1, MOST_SWITCHES + 1, size=2).min())


def mutate(levels: Sequence[int], units: Sequence[Unit], rng: np.random.Generator) -> list[int]:
    """Return levels after one to three switches, of the same number of removed weights.

    Args:
      levels: Level of each unit.
      units: The units.
      rng: Source of what is random.
    """
    new = list(levels)
    for _ in range(draw_switches(rng)):
        rising = [k for k, u in enumerate(units) if new[k] < u.high]
        if not rising:
            break
        up = int(rng.choice(rising))
        falling = [
            k
            for k, u in enumerate(units)
            if k != up and new[k] > u.low and u.weights == units[up].weights
        ]
        if falling:
            new[up] += 1
            new[int(rng.choice(falling))] -= 1
    return new


def window_divergence(
    head: Callable[[Any, jax.Array], jax.Array], non_block: Any, dense: jax.Array, x: jax.Array
) -> jax.Array:
    """Return the mean over positions of KL(dense || pruned) of the next token's distribution.

    Args:
      head: (parameters, x [b t d]) -> logits float32 [b t vocab].
      non_block: Its parameters.
      dense: Hidden states after the last block of the dense model, [b t d].
      x: Those of the pruned one.

    Returns:
      Divergence of each window in nats, float32 [b].
    """

    def window(states: tuple[jax.Array, jax.Array]) -> jax.Array:
        log_p, log_q = (jax.nn.log_softmax(head(non_block, s[None])[0]) for s in states)
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    # One window at a time: its logits are as large as the weights of a block, twice.
    return jax.lax.map(window, (dense, x))
