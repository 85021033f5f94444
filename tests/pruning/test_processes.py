"""Two processes, as two hosts have them, prune as one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pruning.methods import ALLOCATIONS, METHODS
from pruning.types import Request, prune
from reference.small import model, tokens

TESTS = Path(__file__).parents[1]
RUNS = ["wanda", "sparsegpt", "sparsellm", "wanda+neuroal"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes made together."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options["env"] = os.environ | paths | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, str(TESTS / "reference/two_processes.py"), port]
    started = [subprocess.Popen([*command, str(rank), str(folder), *RUNS], **options) for rank in (0, 1)]
    said = [p.communicate(timeout=600)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], "\n".join(said)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_leave_the_same_masks(output: Path, name: str) -> None:
    method, _, allocation = name.partition("+")
    request = Request(0.5, allocation=ALLOCATIONS[allocation]() if allocation else None)
    want, _ = prune(model("llama-gqa"), METHODS[method](), tokens(8), request)
    with np.load(output / f"{name}.npz") as got:
        pairs = list(zip(got.values(), map(np.asarray, jax.tree.leaves(want.blocks)), strict=True))
    for ours, alone in pairs:
        assert np.array_equal(ours == 0, alone == 0)
        np.testing.assert_allclose(ours, alone, atol=1e-3)
