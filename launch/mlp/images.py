"""Load small images for `launch.mlprank`.

The digits of scikit-learn need no network connection; MNIST and Fashion-MNIST come from the hub.
"""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError, first_line

HUB = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}
DATASETS = ("digits", *HUB)
HUB_VALID = 10_000  # images held back from a hub set's training split


class Part(NamedTuple):
    """Images and their classes.

    Attributes:
      x: Pixels, float32 [n pixels], 0 to 1.
      y: Classes, int32 [n], 0 to 9.
    """

    x: jax.Array
    y: jax.Array


class Images(NamedTuple):
    """A data set in three parts that share no image.

    Attributes:
      train: Images to train and calibrate on.
      valid: Images to choose settings by.
      test: Images that are only reported.
    """

    train: Part
    valid: Part
    test: Part


def load(name: str) -> Images:
    """Load a data set, with the same parts in every run.

    Args:
      name: One of DATASETS.

    Returns:
      The three parts.

    Raises:
      InputError: scikit-learn is missing, or the hub cannot be reached.
    """
    return _digits() if name == "digits" else _hub(name)


def _digits() -> Images:
    """Load 1,797 images of 8 by 8 pixels: three fifths to train on, a fifth a further part."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as e:
        raise InputError(
            "needs scikit-learn",
            "pip install scikit-learn, or choose `dataset`=mnist",
            field="dataset",
            value="digits",
        ) from e
    pixels, classes = load_digits(return_X_y=True)
    # The file is in the order of the writers: unshuffled, each part would have other hands.
    order = np.random.default_rng(0).permutation(len(pixels))
    fifth = len(pixels) // 5
    return _split(_part(pixels[order] / 16, classes[order]), held_back=2 * fifth, test=fifth)


def _split(part: Part, held_back: int, test: int) -> Images:
    """Hold back the last images of a part; the last `test` of them become the test part."""
    cuts = (len(part.y) - held_back, len(part.y) - test)
    xs, ys = jnp.split(part.x, cuts), jnp.split(part.y, cuts)
    return Images(*map(Part, xs, ys))


def _hub(name: str) -> Images:
    """Load 60,000 images of 28 by 28 pixels, 10,000 of them held back, and 10,000 to test."""
    import datasets

    # The hub client, which sets its own level on import, logs every retry. Offline that buries the
    # one line that says what is wrong.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        splits = datasets.load_dataset(HUB[name])
    except Exception as e:  # datasets, huggingface_hub and httpx each raise their own
        raise InputError(
            f"cannot be reached ({first_line(e)})",
            "connect to the hub, or choose `dataset`=digits",
            field="dataset",
            value=name,
        ) from e
    train, test = (_rows(splits[split]) for split in ("train", "test"))
    return _split(train, HUB_VALID, test=0)._replace(test=test)


def _rows(rows: Any) -> Part:
    """Convert a split of a hub set, grey images and labels."""
    columns = rows.with_format("numpy")[:]
    pixels = np.asarray(columns["image"])
    return _part(pixels.reshape(len(pixels), -1) / np.float32(255), columns["label"])


def _part(pixels: np.ndarray, classes: np.ndarray) -> Part:
    """Put pixels [n pixels] and classes [n] on the device."""
    return Part(jnp.asarray(pixels, jnp.float32), jnp.asarray(classes, jnp.int32))
