"""Runs of launch.prune, one after the other, in a process of its own: python runs.py MODEL OUTPUT JSON [COORDINATOR COUNT RANK].

JSON: {name: flags}; a run writes OUTPUT/name, "again" after it was interrupted once, and prints what share of the tensors it read in
part. Whoever starts it says how many CPU devices there are, and gives the project's path.
"""

import contextlib
import json
import sys

import numpy as np

from launch import prune
from launch.flags.cli import frozen
from launch.run.export import RoundTripCheck
from launch.run.processes import start
from models.arch import Block
from models.checkpoint.tensors import WHOLE, LazyTensors

parts = set[float]()
read = LazyTensors.read


def noted(self: LazyTensors, name: str, rows: slice = WHOLE) -> np.ndarray:
    """`LazyTensors.read`, remembering what share of the rows was asked for."""
    if rows != WHOLE:
        parts.add((rows.stop - rows.start) / self.shapes[name][0])
    return read(self, name, rows)


def interrupted(config: prune.RunConfig) -> None:
    """The run up to its third block."""
    sink = RoundTripCheck.put

    def stopping(self: RoundTripCheck, i: int, block: Block) -> None:
        if i == 2:
            raise KeyboardInterrupt
        sink(self, i, block)

    RoundTripCheck.put = stopping  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        prune.prune(config)
    RoundTripCheck.put = sink  # type: ignore[method-assign]


def main(
    model: str,
    output: str,
    runs: str,
    coordinator: str | None = None,
    count: str = "0",
    rank: str = "-1",
) -> None:
    """Do them all; tokens.npy beside the model's files are what calibrates and evaluates."""
    start(
        {
            "distributed": False,
            "coordinator": coordinator,
            "processes": int(count),
            "process": int(rank),
        }
    )
    LazyTensors.read = noted  # type: ignore[method-assign]
    tokens = f"{model}/tokens.npy"
    for name, flags in json.loads(runs).items():
        common = [
            f"--model={model}",
            f"--output={output}/{name}",
            f"--calibration={tokens}",
            f"--eval_data={tokens}",
        ]
        parts.clear()
        config = frozen(prune.RunConfig, prune.options().parse([*common, *flags]))
        if name == "again":
            interrupted(config)
        prune.prune(config)
        print(f"{name} read in part: {sorted(parts)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
