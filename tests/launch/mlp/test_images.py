"""The images of `launch.mlprank`: parts that share no image, and errors that say what to do."""

import sys
from typing import Any

import numpy as np
import pytest

from launch.mlp import images
from models.errors import InputError


def test_the_parts_of_the_digits_share_no_image_and_have_every_class() -> None:
    pytest.importorskip("sklearn")
    loaded = images.load("digits")
    assert [len(p.y) for p in loaded] == [1079, 359, 359]
    rows = np.concatenate([np.asarray(p.x) for p in loaded])
    assert rows.shape[1] == 64 and rows.min() == 0 and rows.max() == 1
    assert len({row.tobytes() for row in rows}) == len(rows), "an image is in two parts"
    for part in loaded:
        assert np.bincount(np.asarray(part.y), minlength=10).min() > len(part.y) / 20


def test_digits_without_scikit_learn_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        images.load("digits")


def test_a_hub_set_holds_back_the_end_of_its_training_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    rng = np.random.default_rng(0)

    def split(n: int) -> Any:
        pixels = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
        )
        return datasets.Dataset.from_dict(
            {"image": list(pixels), "label": [i % 10 for i in range(n)]}, features=features
        ), pixels

    (train, pixels), (test, test_pixels) = split(25), split(7)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name: {"train": train, "test": test} if name == "ylecun/mnist" else None,
    )
    monkeypatch.setattr(images, "HUB_VALID", 5)
    loaded = images.load("mnist")
    np.testing.assert_array_equal(
        np.rint(np.asarray(loaded.train.x) * 255), pixels[:20].reshape(20, -1)
    )
    np.testing.assert_array_equal(
        np.rint(np.asarray(loaded.valid.x) * 255), pixels[20:].reshape(5, -1)
    )
    np.testing.assert_array_equal(
        np.rint(np.asarray(loaded.test.x) * 255), test_pixels.reshape(7, -1)
    )
    np.testing.assert_array_equal(loaded.valid.y, [0, 1, 2, 3, 4])
    assert loaded.test.y.tolist() == list(range(7))


@pytest.mark.parametrize("name", images.HUB)
def test_an_unreachable_hub_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(name: str) -> Any:
        raise ConnectionError(f"no route to {name}\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        InputError, match=rf"^dataset={name} cannot be reached .*no route.*digits"
    ) as error:
        images.load(name)
    assert "\n" not in str(error.value)
