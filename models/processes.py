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


def several() -> bool:
    """Whether there are several processes."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def together(what: str) -> None:
    """Wait until every process is here; `what` is happening, the same in all of them."""
    if several():
        multihost_utils.sync_global_devices(what)


def on_first(compute: Callable[[], Any]) -> Any:
    """What `compute` gives in the first process, where alone it runs: JSON-able. All processes must call this.

    Its InputError is raised in all of them; of any other exception the others raise a RuntimeError.
    """
    if not several():
        return compute()
    answer, error = {}, None  # type: dict[str, Any], Exception | None
    if first():
        try:
            answer = {"value": compute()}
        except InputError as e:
            answer = {"refused": str(e)}
        except Exception as e:
            answer, error = {"failed": f"{type(e).__name__}: {e}"}, e
    answer = json.loads(_from_first(json.dumps(answer).encode()))
    if error:
        raise error
    if "refused" in answer:
        raise InputError(answer["refused"])
    if "failed" in answer:
        raise RuntimeError(f"the first process failed ({answer['failed']})")
    return answer["value"]


def _from_first(text: bytes) -> bytes:
    """The first process's text, in all of them."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if first():
        padded[:] = np.frombuffer(text, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8))


def agree(facts: dict[str, Any]) -> None:
    """InputError in every process, with their names, where JSON-able facts differ from the first process's."""
    if not several():
        return
    facts = json.loads(json.dumps(facts))
    whole = on_first(lambda: facts)
    mine = [name for name in {**whole, **facts} if whole.get(name) != facts.get(name)]
    differ = multihost_utils.process_allgather(np.bool_(bool(mine)))
    if differ.any():
        who = ", ".join(str(k) for k in np.flatnonzero(differ))
        what = f": {', '.join(mine)}" if mine else ""
        raise InputError(
            f"process {who} differs from process 0 in what it was given{what}; every process needs the same command and files"
        )
