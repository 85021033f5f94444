"""Start a run of several processes, one for each host."""

from typing import Any

import jax

from launch.flags.cli import Flags
from launch.flags.compilation import FLAG
from models.errors import InputError


def process_flags(f: Flags) -> None:
    """Define --distributed, --coordinator, --processes and --process.

    Args:
      f: The command's flags.
    """
    f.group("Several hosts")
    f.boolean(
        "distributed",
        False,
        "join the processes that Cloud TPU, Slurm, Kubernetes or Open MPI have started",
    )
    f.string(
        "coordinator",
        None,
        "HOST:PORT of process 0, for other clusters; needs --processes and --process",
    )
    f.integer("processes", 0, "number of processes, with --coordinator")
    f.integer("process", -1, "number of this process, from 0, with --coordinator", -1)


def start(values: dict[str, Any]) -> None:
    """Join the other processes, if the flags ask for it, without a folder of compiled programs.

    To be called before anything asks JAX for a device.

    Args:
      values: Values of the flags.

    Raises:
      InputError: The flags do not go together, or the processes do not find each other.
    """
    coordinator, count, rank = values["coordinator"], values["processes"], values["process"]
    if coordinator is None:
        if count or rank >= 0:
            raise InputError(
                "`processes` and `process` need `coordinator`=HOST:PORT",
                "give it, or use `distributed` on a cluster that knows its processes",
            )
        if not values["distributed"]:
            return
    elif not 0 <= rank < count:
        raise InputError(
            f"needs `processes`=N and `process` from 0 to N-1, not {count} and {rank}",
            "give both",
            field="coordinator",
            value=coordinator,
        )
    try:
        # JAX asks the cluster for everything that is None.
        jax.distributed.initialize(coordinator, count or None, None if rank < 0 else rank)
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"the processes cannot find each other ({str(e).splitlines()[0]})",
            "give `coordinator`=HOST:PORT, `processes` and `process`",
        ) from e
    if not values[FLAG]:
        # Processes with one folder of programs waited for each other in a collective for ever.
        jax.config.update("jax_enable_compilation_cache", False)
