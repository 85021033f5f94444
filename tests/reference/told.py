"""A progress function that notes what it is told."""

from typing import Any

from models.progress import Advance


class Told:
    """Stages by description: [steps of the stage, steps taken, its other facts]."""

    def __init__(self) -> None:
        self.stages: dict[str, list[Any]] = {}

    def __call__(self, description: str, steps: int, **more: Any) -> Advance:
        stage = self.stages[description] = [steps, more.get("done", 0), more]

        def advance(steps: int = 1, note: str = "") -> None:
            stage[1] += steps

        return advance
