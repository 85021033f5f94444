"""The images of `launch.mlprank`: parts that share no image, and errors that say what to do."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.mlp import images
from models.errors import InputError
from reference.local_hub import LocalHub


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


@pytest.fixture
def images_hub(local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """Return the hub of this machine, for `datasets` too."""
    datasets = pytest.importorskip("datasets")
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"):
        values = {"HF_ENDPOINT": local_hub.url, "HF_HUB_OFFLINE": False}
        monkeypatch.setattr(datasets.config, name, values.get(name, tmp_path / "datasets"))
    return local_hub


def test_a_hub_set_holds_back_the_end_of_its_training_split(
    images_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )

    def split(n: int) -> tuple[bytes, np.ndarray]:
        pixels = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        rows = {"image": list(pixels), "label": [i % 10 for i in range(n)]}
        buffer = io.BytesIO()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(buffer)
        return buffer.getvalue(), pixels

    (train, pixels), (test, test_pixels) = split(25), split(7)
    name = "mnist/{}-00000-of-00001.parquet"
    images_hub.add(
        "ylecun/mnist", {name.format("train"): train, name.format("test"): test}, "datasets"
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
def test_an_unreachable_hub_is_one_line(name: str, images_hub: LocalHub) -> None:
    with pytest.raises(
        InputError, match=rf"^dataset={name} cannot be reached .*{images.HUB[name]}.*digits"
    ) as error:
        images.load(name)
    assert "\n" not in str(error.value)
