"""Recoveries by the names that users write: training after pruning, towards the dense model."""

from collections.abc import Callable

from pruning.recovery.blocks import Blocks
from pruning.recovery.distill import Distill
from pruning.recovery.types import Recovery

RECOVERIES: dict[str, Callable[..., Recovery]] = {"blocks": Blocks, "distill": Distill}
