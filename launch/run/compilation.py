"""Measure how long a command waits for its programs to be compiled."""

import contextlib
from collections.abc import Iterator

import jax

# Beginning of JAX's names of what it does before a new program can run: traces, lowers, compiles.
_STEPS = "/jax/core/compile/"
_COMPILED = f"{_STEPS}backend_compile_duration"
_CACHED = "/jax/compilation_cache/cache_hits"


class Compilation:
    """What was compiled while `counted` was open.

    Attributes:
      programs: Number of programs.
      cached: How many of them came from the compilation cache.
    """

    def __init__(self) -> None:
        self.programs = self.cached = 0
        self._spans: list[tuple[float, float]] = []  # apart from each other, in order

    @property
    def seconds(self) -> float:
        """Time of tracing, lowering, and compiling or loading programs, in seconds."""
        return sum(end - start for start, end in self._spans)

    def record(self) -> dict[str, float | int]:
        """Return `seconds`, `programs` and `cached` for a report."""
        return {"seconds": self.seconds, "programs": self.programs, "cached": self.cached}

    def add(self, event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        """Take the time of an event of JAX's; the other events are left out.

        Args:
          event: Its name.
          start_time: When it began, in seconds.
          end_time: When it ended.
          **kwargs: What else JAX says of it.
        """
        if not event.startswith(_STEPS):
            return
        self.programs += event == _COMPILED
        # The tracing of a function holds that of the functions it calls, which ended before.
        while self._spans and self._spans[-1][1] > start_time:
            start_time = min(start_time, self._spans.pop()[0])
        self._spans.append((start_time, end_time))

    def count(self, event: str, **kwargs: str | int) -> None:
        """Count a program that the cache had.

        Args:
          event: Name of an event of JAX's.
          **kwargs: What else JAX says of it.
        """
        self.cached += event == _CACHED


@contextlib.contextmanager
def counted() -> Iterator[Compilation]:
    """Measure what is compiled inside the context."""
    compilation = Compilation()
    jax.monitoring.register_event_time_span_listener(compilation.add)
    jax.monitoring.register_event_listener(compilation.count)
    try:
        yield compilation
    finally:
        jax.monitoring.unregister_event_time_span_listener(compilation.add)
        jax.monitoring.unregister_event_listener(compilation.count)
