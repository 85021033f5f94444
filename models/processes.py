"""Several processes that run one program over one mesh, as several hosts do: who writes, and how the others learn of it.

Every process does the same in the same order; files that they share are written by the first alone.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from models.errors import InputError


def is_multiprocess() -> bool:
    """Whether there are several processes."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Wait until every process is here; `what` is happening, the same in all of them."""
    if is_multiprocess():
        multihost_utils.sync_global_devices(what)


def run_on_primary(compute: Callable[[], Any]) -> Any:
    """What `compute` gives in the first process, where alone it runs: JSON-able. All processes must call this.

    Its InputError is raised in all of them; of any other exception the others raise a RuntimeError.
    """
    if not is_multiprocess():
        return compute()
    answer, error = {}, None  # type: dict[str, Any], Exception | None
    if is_primary():
        try:
            answer = {"value": compute()}
        except InputError as e:
            answer = {
                "refused": {"reason": e.reason, "remedy": e.remedy, "field": e.field},
                "value": None if e.value is None else str(e.value),
            }
        except Exception as e:
            answer, error = {"failed": f"{type(e).__name__}: {e}"}, e
    answer = json.loads(_from_first(json.dumps(answer).encode()))
    if error:
        raise error
    if "refused" in answer:
        raise InputError(**answer["refused"], value=answer["value"])
    if "failed" in answer:
        raise RuntimeError(f"the first process failed ({answer['failed']})")
    return answer["value"]


def _from_first(text: bytes) -> bytes:
    """The first process's text, in all of them."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if is_primary():
        padded[:] = np.frombuffer(text, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8))


def agree(facts: dict[str, Any]) -> None:
    """InputError in every process, with their names, where JSON-able facts differ from the first process's."""
    if not is_multiprocess():
        return
    facts = json.loads(json.dumps(facts))
    whole = run_on_primary(lambda: facts)
    mine = [name for name in {**whole, **facts} if whole.get(name) != facts.get(name)]
    differ = multihost_utils.process_allgather(np.bool_(bool(mine)))
    if differ.any():
        who = ", ".join(str(k) for k in np.flatnonzero(differ))
        what = f": {', '.join(mine)}" if mine else ""
        raise InputError(
            f"process {who} differs from process 0 in what it was given{what}; every process needs the same command and files"
        )
