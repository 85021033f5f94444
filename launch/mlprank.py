"""Train multi-layer perceptrons on small images, prune their hidden units by each scorer of MLPRank, compare accuracies.

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
from launch.flags.common import check_once, numbers, output_path, seeds
from launch.mlp import images
from launch.mlp import report as mlprank_report
from launch.mlp.report import DENSE, Row
from launch.report.console import progress
from launch.run.staging import check_free
from models import mlp
from models.errors import InputError
from pruning.structured import mlprank, select
from pruning.structured.llmrank_core import SCORERS

CLASSES = 10

Carry = tuple[mlp.Params, optax.OptState]


def options() -> cli.Flags:
    """The flags of `launch.mlprank`."""
    f = cli.Flags("launch.mlprank", __doc__ or "")
    f.string("output", None, "directory to write results.json, accuracy.csv and accuracy.svg to")
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
    f.number("learning_rate", 1e-3, "of Adam")
    f.string(
        "seeds",
        "0,1,2,3,4,5,6,7,8,9",
        "a network each: its parameters, batches, calibration images and random scores",
    )
    f.group("Pruning")
    f.string(
        "scorers",
        ",".join(SCORERS),
        'which to compare; with parameters: "wpr(gamma=0.5,theta=1),mpr(zeroed=0.3)"',
    )
    f.string("ratios", "0.1,0.2,0.3,0.4,0.5,0.6,0.7", "fractions of the hidden units to remove")
    f.choice(
        "scope",
        "local",
        ("local", "global"),
        "the fraction of every layer, or the lowest of all layers together",
    )
    f.integer("calibration_samples", 64, "training images that activations are taken from", 1)
    return f


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the figures depend on, as the flags of the same names say."""

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
    """The settings of a run from the values of the flags. InputError for what cannot be."""
    lists = {
        "hidden": numbers("hidden", values["hidden"], int, lambda v: v >= 1, "widths of 1 or more"),
        "seeds": seeds(values["seeds"]),
        "ratios": numbers(
            "ratios", values["ratios"], float, lambda v: 0 <= v < 1, "fractions from 0 to below 1"
        ),
        "scorers": tuple(calls.split_list(values["scorers"])),
    }
    for text in lists["scorers"]:
        calls.build("scorers", text, mlprank.MAKERS)
    for name, items in lists.items():
        if name != "hidden":
            check_once(name, items)
    if not 0 < values["learning_rate"] < float("inf"):
        raise InputError(f"--learning_rate={values['learning_rate']} must be a positive number")
    return cli.frozen(Settings, values | lists)


@functools.partial(jax.jit, static_argnums=0)
def _epoch(
    batch: int, rate: float, carry: Carry, data: images.Part, key: jax.Array
) -> tuple[Carry, jax.Array]:
    """One pass over the data in a fresh order, an incomplete last batch left out; returns the carry and the mean loss (nats)."""
    optimizer = optax.adam(rate)

    def loss(params: mlp.Params, part: images.Part) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            mlp.apply(params, part.x)[0], part.y
        ).mean()

    def step(carry: Carry, rows: jax.Array) -> tuple[Carry, jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, jax.tree.map(lambda a: a[rows], data))
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    n = data.y.shape[0]
    order = jax.random.permutation(key, n)[: n - n % batch].reshape(-1, batch)
    carry, losses = jax.lax.scan(step, carry, order)
    return carry, losses.mean()


def train(s: Settings, data: images.Part, key: jax.Array) -> mlp.Params:
    """A network trained on `data` by Adam (Kingma & Ba 2015). InputError when training diverges."""
    start, order = jax.random.split(key)
    params = mlp.init((data.x.shape[1], *s.hidden, CLASSES), start)
    carry, loss = (params, optax.adam(s.learning_rate).init(params)), jnp.inf
    for epoch in range(s.epochs):
        carry, loss = _epoch(
            s.batch, s.learning_rate, carry, data, jax.random.fold_in(order, epoch)
        )
    if not jnp.isfinite(loss):
        raise InputError(
            f"training diverged (the loss is {loss}): lower --learning_rate={s.learning_rate}"
        )
    return carry[0]


@jax.jit
def accuracy(params: mlp.Params, keeps: Sequence[jax.Array], part: images.Part) -> jax.Array:
    """The fraction of images classified right with only the hidden units that `keeps` (bool [u], one a hidden layer) keeps."""
    return jnp.mean(jnp.argmax(mlp.apply(mlp.mask(params, keeps), part.x)[0], axis=-1) == part.y)


def _keeps(scope: str, scores: Sequence[np.ndarray], ratio: float) -> select.Keeps:
    return (
        select.local(scores, ratio)
        if scope == "local"
        else select.global_(scores, ratio, [1.0] * len(scores))
    )


def measure(s: Settings, data: images.Images, seed: int) -> list[Row]:
    """Train one network and prune it by every scorer and ratio: a row for the dense network, then one for each."""
    start, draw, noise = jax.random.split(jax.random.key(seed), 3)
    params = train(s, data.train, start)
    samples = jax.random.choice(draw, data.train.x, (s.calibration_samples,), replace=False)

    def row(name: str, ratio: float, keeps: select.Keeps) -> Row:
        size = sum(a.size for a in jax.tree.leaves(mlp.cut(params, keeps)))
        valid, test = (float(accuracy(params, keeps, part)) for part in (data.valid, data.test))
        return Row(name, ratio, seed, valid, test, size)

    rows = [row(DENSE, 0.0, [np.ones(width, bool) for width in s.hidden])]
    for text in s.scorers:
        found = mlprank.importance(
            calls.build("scorers", text, mlprank.MAKERS), params, mlprank.Sample(samples, noise)
        )
        scores = [np.asarray(a) for a in found]
        rows += [row(text, ratio, _keeps(s.scope, scores, ratio)) for ratio in s.ratios]
    return rows


def compare(s: Settings, output: Path) -> list[Row]:
    """The whole comparison, with its files at `output` and its table on the terminal. InputError when something else is there."""
    check_free(output, mlprank_report.RESULTS)
    start, rows, data = time.monotonic(), [], images.load(s.dataset)
    for name in ("batch", "calibration_samples"):
        if getattr(s, name) > len(data.train.y):
            raise InputError(
                f"--{name}={getattr(s, name)} is more than the {len(data.train.y)} training images: lower it"
            )
    with progress() as stage:
        advance = stage("networks", len(s.seeds))
        for seed in s.seeds:
            rows += measure(s, data, seed)
            advance()
    shape = "-".join(map(str, (data.train.x.shape[1], *s.hidden, CLASSES)))
    title = f"MLPRank on {s.dataset}, {shape}, {s.scope} selection"
    protocol = {
        "images": {name: len(part.y) for name, part in data._asdict().items()},
        "jax": jax.__version__,
    }
    content = mlprank_report.results(
        dataclasses.asdict(s), rows, protocol, time.monotonic() - start
    )
    mlprank_report.write(output, title, content, rows)
    Console().print(mlprank_report.table(title, rows))
    print(f"results: {output}")
    return rows


def main(values: dict[str, Any]) -> None:
    """Run with the parsed flags."""
    compare(parse(values), output_path(values["output"]))


if __name__ == "__main__":
    sys.exit(cli.run(options(), main))
