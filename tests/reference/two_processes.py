"""Half of a run over two processes: python two_processes.py PORT RANK OUTPUT METHOD...

Whoever starts it gives each process four CPU devices and the project's path; the mesh spans both. Process 0 writes the pruned
blocks of each method to OUTPUT/METHOD.npz.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType

from models.sharding import MESH_AXES
from pruning.methods import ALLOCATIONS, METHODS
from pruning.types import Request, prune
from reference.small import model, tokens


def main(port: str, rank: int, output: Path, methods: list[str]) -> None:
    """Prune the grouped-query model with each method; a name such as wanda+neuroal has an allocation behind its plus."""
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = jax.make_mesh((4, 2), MESH_AXES, (AxisType.Auto,) * 2)
    for name in methods:
        method, _, allocation = name.partition("+")
        request = Request(0.5, allocation=ALLOCATIONS[allocation]() if allocation else None, mesh=mesh)
        pruned, _ = prune(model("llama-gqa"), METHODS[method](), tokens(8), request)
        whole = multihost_utils.process_allgather(pruned.blocks, tiled=True)
        if rank == 0:
            np.savez(output / f"{name}.npz", *jax.tree.leaves(whole))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
