"""Recoveries by the names that users write: gradient steps after pruning, towards the dense model."""

from collections.abc import Callable

from pruning.recovery.types import Recovery

RECOVERIES: dict[str, Callable[..., Recovery]] = {}
