"""Train multi-layer perceptrons on small images, prune them with MLPRank, compare its scorers.

    python -m launch.mlprank --flagfile=configs/mlprank.flags

The same settings give the same figures on the same machine.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from launch.flags import calls, cli
from launch.flags.common import compilation_flag, output_path
from launch.flags.numbers import check_once, numbers, seeds
from launch.mlp import images, report
from launch.mlp.report import DENSE, Row
from launch.report.progress import progress
from launch.run.places import check_free
from models import mlp
from models.errors import InputError
from pruning.structured import mlprank, select_core
from pruning.structured.page_rank_core import SCORERS

CLASSES = 10

TrainState = tuple[mlp.Params, optax.OptState]


def options() -> cli.Flags:
    """Return the flags of `launch.mlprank`."""
    f = cli.Flags("launch.mlprank", __doc__ or "")
    f.string("output", None, "directory to write results.json, accuracy.csv and accuracy.svg to")
    compilation_flag(f)
    f.group("Network")
    f.choice(
        "dataset",
        "digits",
        images.DATASETS,
        "images to classify; digits needs no network connection",
    )
    f.string("hidden", "128,128", "widths of the hidden layers")
    f.integer("epochs", 60, "passes over the training images", 1)
    f.integer("batch", 64, "images in a step", 1)
    f.number("learning_rate", 1e-3, "learning rate of Adam")
    f.string(
        "seeds",
        "0,1,2,3,4,5,6,7,8,9",
        "one network a seed, which decides its parameters, batches, calibration images and "
        "random scores",
    )
    f.group("Pruning")
    f.string(
        "scorers",
        ",".join(SCORERS),
        'scorers to compare; with parameters: "wpr(gamma=0.5,theta=1),mpr(zeroed=0.3)"',
        names=SCORERS,
        several=True,
    )
    f.string("ratios", "0.1,0.2,0.3,0.4,0.5,0.6,0.7", "fractions of the hidden units to remove")
    f.choice(
        "scope",
        "local",
        ("local", "global"),
        "local removes the fraction of every layer, global the lowest scores of all layers",
    )
    f.integer("calibration_samples", 64, "training images to measure activations on", 1)
    return f


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings that the figures depend on, named as their flags."""

    dataset: str
    hidden: tuple[int, ...]
    epochs: int
    batch: int
    learning_rate: float
    seeds: tuple[int, ...]
    scorers: tuple[str, ...]
    ratios: tuple[float, ...]
    scope: str
    calibration_samples: int


def parse(values: dict[str, Any]) -> Settings:
    """Convert the values of the flags to the settings of a run.

    Args:
      values: Values by the flags' names.

    Returns:
      The settings.

    Raises:
      InputError: A value is not allowed.
    """
    lists = {
        "hidden": numbers("hidden", values["hidden"], int, lambda v: v >= 1, "widths of 1 or more"),
        "seeds": seeds(values["seeds"]),
        "ratios": numbers(
            "ratios", values["ratios"], float, lambda v: 0 <= v < 1, "fractions from 0 to below 1"
        ),
        "scorers": tuple(calls.split_list(values["scorers"])),
    }
    for scorer in lists["scorers"]:
        calls.build("scorers", scorer, mlprank.MAKERS)
    for name, items in lists.items():
        if name != "hidden":  # two hidden layers may have the same width
            check_once(name, items)
    rate = values["learning_rate"]
    if not 0 < rate < float("inf"):
        raise InputError("must be a positive number", field="learning_rate", value=rate)
    return cli.frozen(Settings, values | lists)


@functools.partial(jax.jit, static_argnums=0)
def _epoch(
    batch: int, rate: float, state: TrainState, data: images.Part, key: jax.Array
) -> tuple[TrainState, jax.Array]:
    """Train for one pass over the data in random order, without an incomplete last batch.

    Args:
      batch: Images in a step.
      rate: Learning rate.
      state: Parameters and state of the optimizer.
      data: Training images.
      key: Random key of the order.

    Returns:
      The new state, and the mean loss in nats.
    """
    optimizer = optax.adam(rate)

    def loss(params: mlp.Params, part: images.Part) -> jax.Array:
        logits, _ = mlp.apply(params, part.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, part.y).mean()

    def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, jax.Array]:
        params, moments = state
        part = jax.tree.map(lambda a: a[rows], data)
        value, gradient = jax.value_and_grad(loss)(params, part)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    n = data.y.shape[0]
    order = jax.random.permutation(key, n)[: n - n % batch].reshape(-1, batch)
    state, losses = jax.lax.scan(step, state, order)
    return state, losses.mean()


def train(s: Settings, data: images.Part, key: jax.Array) -> mlp.Params:
    """Train a network with Adam.

    Source: Kingma and Ba 2015.

    Args:
      s: Settings.
      data: Training images.
      key: Random key of the parameters and of the order of images.

    Returns:
      The trained network.

    Raises:
      InputError: Training diverges.
    """
    init_key, order_key = jax.random.split(key)
    params = mlp.init((data.x.shape[1], *s.hidden, CLASSES), init_key)
    state = (params, optax.adam(s.learning_rate).init(params))
    loss = jnp.inf
    for epoch in range(s.epochs):
        key = jax.random.fold_in(order_key, epoch)
        state, loss = _epoch(s.batch, s.learning_rate, state, data, key)
    if not jnp.isfinite(loss):
        raise InputError(
            f"makes training diverge (the loss is {loss})",
            "lower it",
            field="learning_rate",
            value=s.learning_rate,
        )
    return state[0]


@jax.jit
def accuracy(params: mlp.Params, keeps: Sequence[jax.Array], part: images.Part) -> jax.Array:
    """Return the fraction of images that a masked network classifies correctly.

    Args:
      params: The network.
      keeps: Hidden units to keep, bool [u], one array a hidden layer.
      part: Images with their classes.
    """
    logits, _ = mlp.apply(mlp.mask(params, keeps), part.x)
    return jnp.mean(jnp.argmax(logits, axis=-1) == part.y)


def _select(scope: str, scores: Sequence[np.ndarray], ratio: float) -> select_core.Keeps:
    """Return the hidden units to keep, bool [u], one array a hidden layer."""
    if scope == "local":
        return select_core.select_lowest_per_block(scores, ratio)
    return select_core.select_lowest_overall(
        scores, ratio, [1.0] * len(scores)
    )  # every unit counts the same


def evaluate_seed(s: Settings, data: images.Images, seed: int) -> list[Row]:
    """Train one network, and prune it with every scorer to every ratio.

    Args:
      s: Settings.
      data: The data set.
      seed: Seed of the network.

    Returns:
      A row for the dense network, then one for every scorer and ratio.
    """
    train_key, draw_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    params = train(s, data.train, train_key)
    drawn = jax.random.choice(draw_key, data.train.x, (s.calibration_samples,), replace=False)
    sample = mlprank.Sample(drawn, noise_key)

    def row(scorer: str, ratio: float, keeps: select_core.Keeps) -> Row:
        size = sum(a.size for a in jax.tree.leaves(mlp.cut(params, keeps)))
        valid = float(accuracy(params, keeps, data.valid))
        test = float(accuracy(params, keeps, data.test))
        return Row(scorer, ratio, seed, valid, test, size)

    rows = [row(DENSE, 0.0, [np.ones(width, bool) for width in s.hidden])]
    for scorer in s.scorers:
        score = calls.build("scorers", scorer, mlprank.MAKERS)
        scores = [np.asarray(a) for a in mlprank.importance(score, params, sample)]
        rows += [row(scorer, ratio, _select(s.scope, scores, ratio)) for ratio in s.ratios]
    return rows


def compare(s: Settings, output: Path) -> list[Row]:
    """Run the comparison, write its report and print its table.

    Args:
      s: Settings.
      output: Directory of the report.

    Returns:
      One row for each network, dense or pruned.

    Raises:
      InputError: The output exists and is not a report, or the data set has too few images.
    """
    check_free(output, report.RESULTS)
    start = time.monotonic()
    data = images.load(s.dataset)
    for name in ("batch", "calibration_samples"):
        if getattr(s, name) > len(data.train.y):
            raise InputError(
                f"is more than the {len(data.train.y)} training images",
                "lower it",
                field=name,
                value=getattr(s, name),
            )
    rows: list[Row] = []
    with progress() as stage:
        advance = stage("training and pruning", len(s.seeds), unit="networks")
        for seed in s.seeds:
            rows += evaluate_seed(s, data, seed)
            advance()
    shape = "-".join(map(str, (data.train.x.shape[1], *s.hidden, CLASSES)))
    title = f"MLPRank on {s.dataset}, {shape}, {s.scope} selection"
    protocol = {
        "images": {name: len(part.y) for name, part in data._asdict().items()},
        "jax": jax.__version__,
    }
    content = report.results(dataclasses.asdict(s), rows, protocol, time.monotonic() - start)
    report.write(output, title, content, rows)
    Console().print(report.table(title, rows))
    print(f"results: {output}")
    return rows


def main(values: dict[str, Any]) -> None:
    """Run the command with the values of its flags."""
    compare(parse(values), output_path(values["output"]))


if __name__ == "__main__":
    sys.exit(cli.run(options(), main))
