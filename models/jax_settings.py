"""Change JAX's settings for a while, in all threads and in processes started meanwhile."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax


def current(name: str) -> Any:
    """Return the value of a setting of JAX in this thread.

    Args:
      name: Its name, such as "jax_compilation_cache_dir".
    """
    config: Any = jax.config  # JAX declares no types of its settings
    return getattr(config, name)


@contextlib.contextmanager
def changed(settings: Mapping[str, Any]) -> Iterator[None]:
    """Change settings until the context ends.

    Args:
      settings: Values by name.
    """
    before = {name: current(name) for name in settings}
    # JAX reads a setting from the variable of its name when it is imported.
    environment = {name.upper(): os.environ.get(name.upper()) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        for variable, text in environment.items():
            os.environ.pop(variable)
            if text is not None:
                os.environ[variable] = text
