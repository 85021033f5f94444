"""Run launch.prune in this process and read its output."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from launch import prune
from launch.flags.cli import run


def call(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return run(prune.options(), prune.main, argv)


def report_of(output: pathlib.Path) -> dict[str, Any]:
    """Read the report of a run."""
    return json.loads((output / "pruning_report.json").read_text())


def weights(output: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the tensors of a run's checkpoint."""
    tensors = {}
    for file in sorted(output.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
