"""Types of recovery: gradient steps after pruning that keep the model's shapes and zeros."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from calibration.runtime import Runtime
from models.arch import Model, NonBlockParams
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from pruning.figures import Figure
from pruning.types import BlockSink


class RecoveryInputs(NamedTuple):
    """Everything that a recovery reads.

    The zeros of the pruned model are what must stay: `pruning.recovery.zeros` finds, keeps and
    checks them.

    Attributes:
      pruned: Model to recover, read one block at a time, never changed.
      dense: The teacher, read one block at a time.
      kept_blocks: Index in the dense model of each block of the pruned one, rising.
      windows: Calibration windows, int [samples length].
      draw: Number of windows -> other windows of the same source and length, int [samples length];
        the same ones for the same number. Fewer where the source has no more.
      directory: Directory of an interrupted recovery's own files, which outlives the process and is
        removed when the recovery is done. It may not exist yet.
      seed: Seed of everything random.
    """

    pruned: Model
    dense: Model
    kept_blocks: tuple[int, ...]
    windows: np.ndarray
    draw: Callable[[int], np.ndarray]
    directory: pathlib.Path
    seed: int = 0


class Recovered(NamedTuple):
    """Result of a recovery, besides the blocks that the sink has.

    Attributes:
      tokens: Tokens that updates were computed from, each as often as it was used.
      details: Figures of the recovery, JSON-able.
      figures: Plots and tables for the report.
      warnings: Sentences that the report's reader must see.
      notes: Sentences that a reader may want to know, and need not act on.
      non_block: Parameters outside the blocks, where the recovery changed them; else None.
    """

    tokens: int
    details: Mapping[str, Any] = {}
    figures: tuple[Figure, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    non_block: NonBlockParams | None = None


class Recovery(Protocol):
    """A recovery: a frozen configuration that a user names with `recover`."""

    def check(self, dense: Model, change: ShapeChange, windows: int) -> None:
        """Raise InputError for what the recovery cannot do; reads no parameters.

        It runs before any work.

        Args:
          dense: The teacher.
          change: How the pruned model's shapes differ from the teacher's.
          windows: Number of calibration windows.
        """

    def run(self, inputs: RecoveryInputs, runtime: Runtime, sink: BlockSink) -> Recovered:
        """Train what is left of the model towards its teacher.

        Where there is a journal, what is finished is kept in its steps and in `inputs.directory`,
        so that a run that goes on gives the same bytes.

        Args:
          inputs: What to recover, and from what.
          runtime: How to execute; no result depends on it. `batch` is that of passes without
            gradients; a recovery has its own for updates.
          sink: Takes every finished block, in order, with the shapes, the types and the zeros of
            the pruned one.

        Returns:
          What the report says about it.

        Raises:
          InputError: The recovery cannot be done.
        """


def check_limits(name: str, settings: Any, limits: Mapping[str, tuple[bool, str]]) -> None:
    """Check the numbers of a recovery.

    Args:
      name: Name of the recovery.
      settings: Its configuration.
      limits: By field: whether its value holds, and what it must be.

    Raises:
      InputError: A number is out of range.
    """
    for field, (holds, limit) in limits.items():
        if not holds:
            raise InputError(f"{name}: {field}={getattr(settings, field)} must be {limit}")
