"""Cache of step results that the runs of one process share."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

SMALL = 1 << 20  # bytes of a value up to which it makes no room for others


class StepCache:
    """In-process cache of step results, keyed by everything they depend on.

    Args:
      limit: Most bytes of arrays to keep; the oldest values that are not small make room.

    Attributes:
      reused: Number of values that were read from the cache.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.reused = 0
        self._limit = limit
        self._values: dict[Hashable, tuple[Any, int]] = {}  # value and its bytes, oldest first

    def get(self, key: Hashable) -> Any:
        """Return the value of a key, or None."""
        value, _ = self._values.get(key, (None, 0))
        if value is not None:
            self.reused += 1
        return value

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep a value. Nobody may change it from here on."""
        # Arrays alone decide: text and numbers are small beside them.
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(value))
        # A value beyond the limit would push out all others and still not fit.
        if size > self._limit:
            return
        self._values[key] = value, size
        while sum(size for _, size in self._values.values()) > self._limit:
            # A small one, such as the dense model's perplexity, may have taken minutes.
            large = (key for key, (_, size) in self._values.items() if size > SMALL)
            del self._values[next(large, next(iter(self._values)))]

    def get_or_compute(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return the value of a key; compute and keep it if the cache has none."""
        value = self.get(key)
        if value is None:
            value = compute()
            self.keep(key, value)
        return value


class ScoreCache(StepCache):
    """Cache of a run's steps that also gives and takes the scores of the dense model.

    Args:
      inner: Cache of all other steps.
      key: Key of the step that gives the scores.
      scores: Scores of an earlier run; None to compute them.

    Attributes:
      scores: Scores, once the run has them.
    """

    def __init__(self, inner: StepCache, key: Hashable, scores: Any = None) -> None:
        super().__init__(0)
        self.scores = scores
        self._inner = inner
        self._key = key

    def get(self, key: Hashable) -> Any:
        """Return the value of a key, or None."""
        # A journal's keys are pairs of what all of its steps depend on and of the step's own key.
        if isinstance(key, tuple) and key[1] == self._key and self.scores is not None:
            return self.scores
        return self._inner.get(key)

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep a value. Nobody may change it from here on."""
        if isinstance(key, tuple) and key[1] == self._key:
            self.scores = value
        self._inner.keep(key, value)
