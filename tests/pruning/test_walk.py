"""A walk that only looks is made once for all runs of a process that would see the same."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from calibration.journal import Journal
from calibration.observers import second_moment
from calibration.step_cache import StepCache
from models.arch import Model
from models.init import init_model
from pruning.types import Request
from pruning.walk import fold
from reference.small import CONFIGS, VOCAB


class Sink:
    def mark(self) -> None: ...
    def rewind(self, mark: Any) -> None: ...


@pytest.fixture(scope="module")
def model() -> Model:
    return init_model(CONFIGS["llama"], jax.random.key(0))


def walked(
    model: Model,
    tokens: np.ndarray,
    directory: Path,
    memory: StepCache,
    *,
    key: Any,
    watched: bool = True,
) -> tuple[list, int]:
    """What a walk over the tokens records, and how many blocks it visited."""
    visited = []

    def visit(i: int, block: Any, stats: Any) -> tuple[Any, Any]:
        visited.append(i)
        return block, {name: s.total for name, s in stats.items()} or {"block": i}

    directory.mkdir()
    request = Request(0.5, batch=2, journal=Journal(directory, {}, Sink(), memory, "model"))
    watch = {s.reads: second_moment for s in model.arch.slots} if watched else {}
    found = fold(
        model, tokens, request, visit, watch=watch, propagate="dense", what="looking", key=key
    )
    return found, len(visited)


@pytest.mark.parametrize("watched", [True, False], ids=["of activations", "of weights"])
def test_other_tokens_are_looked_at_only_where_tokens_matter(
    watched: bool, model: Model, tmp_path: Path
) -> None:
    a, b = np.random.default_rng(0).integers(0, VOCAB, (2, 2, 8), np.int32)
    memory, depth = StepCache(), len(model.blocks)
    first, visits = walked(model, a, tmp_path / "1", memory, key="k", watched=watched)
    assert visits == depth
    again, visits = walked(model, a, tmp_path / "2", memory, key="k", watched=watched)
    assert visits == 0
    jax.tree.map(np.testing.assert_array_equal, again, first)
    other, visits = walked(model, b, tmp_path / "3", memory, key="k", watched=watched)
    assert visits == (depth if watched else 0)
    assert (
        any(
            (x != y).any()
            for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(first), strict=True)
        )
        if watched
        else other == first
    )


def test_walks_without_a_key_or_with_another_one_are_made(model: Model, tmp_path: Path) -> None:
    tokens, memory = np.random.default_rng(0).integers(0, VOCAB, (2, 8), np.int32), StepCache()
    keys = [None, "k", None, ("k", 2)]
    assert [
        walked(model, tokens, tmp_path / str(n), memory, key=key)[1] for n, key in enumerate(keys)
    ] == [len(model.blocks)] * 4
