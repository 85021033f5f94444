"""Several runs of launch.prune in one process: runs.py MODEL OUTPUT JSON [COORDINATOR COUNT RANK].

JSON is {name: flags}. A run writes OUTPUT/name, the run "again" after one interruption, and prints
the share of rows that it read of tensors it did not read whole. The caller sets the number of CPU
devices and the project's path.
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
    """Read as `LazyTensors.read`, and record the share of the rows."""
    if rows != WHOLE:
        parts.add((rows.stop - rows.start) / self.shapes[name][0])
    return read(self, name, rows)


def interrupted(config: prune.RunConfig) -> None:
    """Run up to the third block."""
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
    """Run all; tokens.npy beside the model's files calibrates and evaluates."""
    start(
        {
            "compilation_cache": "",
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
