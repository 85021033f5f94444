"""Small images for `launch.mlprank`: scikit-learn's digits, which need no network, and MNIST and Fashion-MNIST from the hub."""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError

HUB = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}
DATASETS = ("digits", *HUB)
VALID = 10_000  # images held back from a hub set's training split


class Part(NamedTuple):
    """Images as rows of pixels, and their classes."""

    x: jax.Array  # float32 [n pixels], 0 to 1
    y: jax.Array  # int32 [n], 0 to 9


class Images(NamedTuple):
    """A data set in three parts without an image in common; choices are made on `valid`, `test` is only reported."""

    train: Part
    valid: Part
    test: Part


def load(name: str) -> Images:
    """One of DATASETS, the same parts in every run. InputError when scikit-learn is missing or the hub cannot be reached."""
    return _digits() if name == "digits" else _hub(name)


def _digits() -> Images:
    """1,797 images of 8 by 8 pixels, shuffled once (the file is in the order of the writers): three fifths, a fifth, a fifth."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as e:
        raise InputError(
            "--dataset=digits needs scikit-learn: pip install scikit-learn, or choose --dataset=mnist"
        ) from e
    pixels, classes = load_digits(return_X_y=True)
    order, fifth = np.random.default_rng(0).permutation(len(pixels)), len(pixels) // 5
    return _split(_part(pixels[order] / 16, classes[order]), 2 * fifth, fifth)


def _split(part: Part, held: int, test: int) -> Images:
    """The last `held` images apart, the last `test` of those as the test part."""
    cuts = (len(part.y) - held, len(part.y) - test)
    xs, ys = jnp.split(part.x, cuts), jnp.split(part.y, cuts)
    return Images(*map(Part, xs, ys))


def _hub(name: str) -> Images:
    """60,000 images of 28 by 28 pixels to train on, the last 10,000 of them held back, and 10,000 to test."""
    import datasets

    # The hub client, which sets its own level on import, logs every retry; offline that buries the one line that says what is wrong.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        sets = datasets.load_dataset(HUB[name])
    except Exception as e:  # datasets, huggingface_hub and httpx each raise their own
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"--dataset={name} cannot be reached: {reason}; connect to the hub, or choose --dataset=digits"
        ) from e
    train, test = (_rows(sets[split]) for split in ("train", "test"))
    return _split(train, VALID, 0)._replace(test=test)


def _rows(rows: Any) -> Part:
    """A split of the hub's set: grey images and labels."""
    columns = rows.with_format("numpy")[:]
    images = np.asarray(columns["image"])
    return _part(images.reshape(len(images), -1) / np.float32(255), columns["label"])


def _part(pixels: np.ndarray, classes: np.ndarray) -> Part:
    return Part(jnp.asarray(pixels, jnp.float32), jnp.asarray(classes, jnp.int32))
