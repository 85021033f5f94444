"""The calls by which long work says how far it is."""

from typing import Protocol


class Advance(Protocol):
    """A function to call after work has been done."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Report work that has been done.

        Args:
          steps: Number of steps since the last call.
          note: How the work goes, in a few words, such as a loss; empty for nothing to say.
        """


class Progress(Protocol):
    """A function to call at the beginning of a stage of the work."""

    def __call__(
        self, description: str, steps: int, *, unit: str = "", tokens: int = 0, done: int = 0
    ) -> Advance:
        """Begin a stage.

        Args:
          description: The work, in a few words.
          steps: Steps of the whole stage, each about as long as the others.
          unit: What a step is, in the plural; empty if it says nothing to a reader.
          tokens: Tokens that the whole stage reads; 0 if they say nothing about its speed.
          done: Steps that an earlier run has done already.

        Returns:
          Function to call after one or several steps.
        """


def no_advance(steps: int = 1, note: str = "") -> None:
    """Report nothing after a step."""


def no_progress(
    description: str, steps: int, *, unit: str = "", tokens: int = 0, done: int = 0
) -> Advance:
    """Report nothing about a stage."""
    return no_advance
