"""Measure a dense model and what was made of it, all alike."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from calibration.data import Tokens
from launch.run.agreement import DenseStates, figures
from launch.run.measure import NO_VISITS, Visit, measure_checkpoint
from launch.run.tasks import ZeroShot
from models.checkpoint.reader import Checkpoint
from models.progress import Progress


class Comparisons(NamedTuple):
    """Measurements that all models of a run have in common.

    Attributes:
      checkpoint: The dense model.
      states: Its last hidden states, which other models are compared with.
      data: Evaluation windows by data set.
      zero_shot: Zero-shot tasks; None for none.
      batch: Windows, or requests of a task, at a time.
      mesh: Devices; None: one.
      task_cache: Whether to use and keep a model's answers to tasks.
    """

    checkpoint: Checkpoint
    states: DenseStates
    data: Mapping[str, Tokens]
    zero_shot: ZeroShot | None
    batch: int
    mesh: Mesh | None
    task_cache: bool

    def _measured(
        self, checkpoint: Checkpoint, progress: Progress, visits: Mapping[str, Visit] = NO_VISITS
    ) -> dict[str, Any]:
        settings = (self.data, self.zero_shot, self.batch, self.mesh, self.task_cache)
        return measure_checkpoint(checkpoint, *settings, progress, visits)

    def dense(self, progress: Progress) -> dict[str, Any]:
        """Measure the dense model and keep the hidden states that others are compared with.

        Args:
          progress: Shows the progress.

        Returns:
          As `measure_checkpoint` does.
        """
        return self._measured(self.checkpoint, progress, self.states.recorders())

    def pruned(self, checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
        """Measure another model and compare it with the dense one.

        Args:
          checkpoint: The model.
          progress: Shows the progress.

        Returns:
          As `measure_checkpoint` does, and "agreement" by data set.
        """
        comparisons = self.states.comparisons(checkpoint.model, progress)
        measured = self._measured(checkpoint, progress, comparisons)
        return measured | {"agreement": figures(comparisons)}
