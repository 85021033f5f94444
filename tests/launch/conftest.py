"""Fixtures that tests of several commands share."""

import pytest

from launch import prune
from launch.run import export


@pytest.fixture
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report's samples, which compile anew for every shape of model."""
    monkeypatch.setattr(prune, "samples", lambda *_: [])


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check by transformers, which takes a second a run."""
    monkeypatch.setattr(export, "_by_transformers", lambda *_: export.Check(True, "not checked"))
