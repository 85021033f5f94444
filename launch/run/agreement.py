"""Compare pruned models with their dense model on the evaluation windows.

The dense model is evaluated once. What comparisons need of it is kept in temporary files: its last
hidden states, not its logits.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from calibration.data import Tokens
from calibration.states import States
from eval.agreement import Comparison, check_vocabularies
from eval.forward import last_states
from models.arch import Model
from models.progress import Progress
from models.sharding import place, to_host


class DenseStates:
    """Last hidden states of a dense model over the evaluation windows.

    Args:
      model: The dense model.
      data: Evaluation windows by data set.
      batch: Windows at a time.
      mesh: Devices; None: one.
    """

    def __init__(self, model: Model, data: Mapping[str, Tokens], batch: int, mesh: Mesh | None):
        self._model, self._data, self._batch, self._mesh = model, data, batch, mesh
        self._states: dict[str, States] = {}

    def recorders(self) -> dict[str, "functools.partial[None]"]:
        """Return for each data set the function that keeps the hidden states of a micro-batch."""
        return {name: self._recorder(name) for name in self._data}

    def _recorder(self, name: str) -> "functools.partial[None]":
        # Files whatever the size: the run needs the memory for other things until the end.
        self._states[name] = States([], "disk", self._mesh)
        return functools.partial(_record, self._states[name])

    def comparisons(self, model: Model, progress: Progress) -> dict[str, Comparison]:
        """Return for each data set the comparison of a model with the dense one.

        Args:
          model: The model.
          progress: Shows the passes of the dense model that are missing, since an interrupted run
            evaluated it.

        Raises:
          InputError: The vocabularies have different sizes.
        """
        check_vocabularies(self._model, model)
        return {
            name: Comparison(self._model, self._complete(name, progress), model, self._mesh)
            for name in self._data
        }

    def _complete(self, name: str, progress: Progress) -> States:
        """Return the states of all micro-batches of a data set, computed if they are not there."""
        windows = self._data[name].ids
        starts = range(0, len(windows), self._batch)
        if len(self._states.get(name, ())) != len(starts):
            model, record = self._model, self._recorder(name)
            steps = windows.size * len(model.blocks)
            advance = progress(f"the dense model's states on {name}", steps, tokens=windows.size)
            batches = [windows[start : start + self._batch] for start in starts]
            non_block = place(model.non_block, self._mesh)
            for _, x in last_states(model, non_block, batches, self._mesh, advance):
                record(x)
        return self._states[name]


def _record(states: States, x: jax.Array) -> None:
    # Whole in every process: each reads its own files.
    states.append(to_host(x))


def figures(comparisons: Mapping[str, Comparison]) -> dict[str, dict[str, Any]]:
    """Return the report's `agreement` of comparisons that have seen all windows.

    Args:
      comparisons: Comparison by data set.

    Returns:
      By data set: "kl" in nats per token, "top1" as a fraction, and their standard errors over
      windows, null where they are unknown, as "kl_stderr" and "top1_stderr".
    """
    result = {}
    for name, comparison in comparisons.items():
        found = comparison.result()
        kl, top1 = found.kl, found.top1
        result[name] = {
            "kl": kl.value,
            "kl_stderr": kl.error,
            "top1": top1.value,
            "top1_stderr": top1.error,
        }
    return result
