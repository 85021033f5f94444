"""Fixtures that tests of several commands share."""

from pathlib import Path

import jax
import numpy as np
import pytest

from launch import prune
from launch.run import export
from launch.run.samples import Samples
from models.checkpoint.writer import save
from models.init import init_model


@pytest.fixture(scope="module")
def trial_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small `llama` checkpoint, `calib.npy` and `eval.npy`."""
    config = dict(
        model_type="llama",
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    root = tmp_path_factory.mktemp("inputs")
    save(root / "llama", init_model(config, jax.random.key(1)), config, root)
    rng = np.random.default_rng(0)
    np.save(root / "calib.npy", rng.integers(0, 64, (4, 16), np.int32))
    np.save(root / "eval.npy", rng.integers(0, 64, (2, 16), np.int32))
    return root


@pytest.fixture
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report's samples, which compile anew for every shape of model."""
    monkeypatch.setattr(prune, "samples", lambda *_: Samples([], {}))


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check by transformers, which takes a second a run."""
    monkeypatch.setattr(export, "_by_transformers", lambda *_: export.Check(True, "not checked"))
