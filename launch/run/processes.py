"""Several processes, one a host: the flags that say so, and how they find each other."""

from typing import Any

import jax

from launch.flags.cli import Flags
from models.errors import InputError


def process_flags(f: Flags) -> None:
    """--distributed, --coordinator, --processes, --process."""
    f.group("Several hosts")
    f.boolean(
        "distributed",
        False,
        "one of several processes, which Cloud TPU, Slurm, Kubernetes or Open MPI tell of each other",
    )
    f.string(
        "coordinator",
        None,
        "HOST:PORT of process 0, where nothing tells; with --processes and --process",
    )
    f.integer("processes", 0, "how many processes there are, with --coordinator")
    f.integer("process", -1, "which of them this is, from 0, with --coordinator", -1)


def start(values: dict[str, Any]) -> None:
    """Join the other processes, if the flags speak of any. To be called before anything asks JAX for a device.

    InputError for flags that do not go together, or where nobody tells of the others.
    """
    where, count, rank = values["coordinator"], values["processes"], values["process"]
    if where is None:
        if count or rank >= 0:
            raise InputError(
                "--processes and --process need --coordinator=HOST:PORT; --distributed finds out by itself"
            )
        if not values["distributed"]:
            return
    elif not 0 <= rank < count:
        raise InputError(
            f"--coordinator={where} needs --processes=N and --process from 0 to N-1; got {count} and {rank}"
        )
    try:
        jax.distributed.initialize(where, count or None, None if rank < 0 else rank)
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"the processes cannot find each other ({str(e).splitlines()[0]}): give --coordinator=HOST:PORT, --processes and --process"
        ) from e
