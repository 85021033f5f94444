"""Coordination of several processes that run one program over one mesh.

Every process runs the same steps in the same order. Shared files are written by the primary alone.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from models.errors import InputError


def is_multiprocess() -> bool:
    """Return True if several processes run."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Return True in the process that prints and writes."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Wait until every process has arrived.

    Args:
      what: Name of the point, the same in all processes.
    """
    if is_multiprocess():
        multihost_utils.sync_global_devices(what)


def run_on_primary(compute: Callable[[], Any]) -> Any:
    """Run a function in the primary process and broadcast its result.

    All processes must call this.

    Args:
      compute: Function that returns a JSON-able value.

    Returns:
      Value of `compute`, in every process.

    Raises:
      InputError: The primary raised it; every process raises it.
      RuntimeError: The primary raised another exception, which it raises itself.
    """
    if not is_multiprocess():
        return compute()
    answer: dict[str, Any] = {}
    error: Exception | None = None
    if is_primary():
        # An exception must not leave here before the others have their answer: they would wait
        # for the broadcast for ever.
        try:
            answer = {"value": compute()}
        except InputError as e:
            answer = {
                "input_error": {"reason": e.reason, "remedy": e.remedy, "field": e.field},
                "value": None if e.value is None else str(e.value),
            }
        except Exception as e:
            answer, error = {"failure": f"{type(e).__name__}: {e}"}, e
    answer = json.loads(_broadcast_text(json.dumps(answer).encode()))
    if error:
        raise error
    if "input_error" in answer:
        raise InputError(**answer["input_error"], value=answer["value"])
    if "failure" in answer:
        raise RuntimeError(f"the first process failed ({answer['failure']})")
    return answer["value"]


def _broadcast_text(text: bytes) -> bytes:
    """Return the primary's text in every process."""
    # The length first: a broadcast needs arrays of one shape in all processes.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if is_primary():
        padded[:] = np.frombuffer(text, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8))


def check_agreement(facts: dict[str, Any]) -> None:
    """Check that all processes have the same facts.

    Args:
      facts: JSON-able values by name.

    Raises:
      InputError: A process differs from the primary; every process raises it.
    """
    if not is_multiprocess():
        return
    # Through JSON, as the primary's are, so that tuples equal lists.
    facts = json.loads(json.dumps(facts))
    primary = run_on_primary(lambda: facts)
    differing = [name for name in {**primary, **facts} if primary.get(name) != facts.get(name)]
    # Gathered, so that all processes raise and none waits for one that has stopped.
    differs = multihost_utils.process_allgather(np.bool_(bool(differing)))
    if differs.any():
        processes = ", ".join(str(k) for k in np.flatnonzero(differs))
        names = f" ({', '.join(differing)})" if differing else ""
        raise InputError(
            f"process {processes} differs from process 0 in what it was given{names}",
            "start every process with the same command and files",
        )
