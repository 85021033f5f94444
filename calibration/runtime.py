"""Settings of the execution of a run; no result depends on them."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from jax.sharding import Mesh

from calibration.journal import Journal, to_serialisable
from calibration.states import Offload
from models.progress import Progress, no_progress


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Settings of how a run executes.

    Attributes:
      batch: Windows in one micro-batch.
      mesh: Devices that windows (axis `data`) and matrices (axis `model`) are split over;
        None: one device.
      offload: Memory that holds the hidden states between two blocks.
      progress: Shows the progress of a stage.
      journal: Keeps finished steps, so that an interrupted run goes on; None: nothing is kept.
    """

    batch: int = 8
    mesh: Mesh | None = None
    offload: Offload = "device"
    progress: Progress = no_progress
    journal: Journal | None = None

    def step(self, compute: Callable[[], Any], key: Hashable = None) -> Any:
        """Return `compute()`, as a durable step where there is a journal.

        Args:
          compute: Gives a value that `Journal.step` can keep.
          key: Everything the value depends on, so that runs of one process can share it; None: it
            is not shared.
        """
        # Serialised without a journal as well, so that a value is the same in either case.
        return self.journal.step(compute, key) if self.journal else to_serialisable(compute())
