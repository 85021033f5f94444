"""A run's memory does not grow with the number of blocks, and streaming changes no bit."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Block
from models.checkpoint.blocks import LazyBlocks
from models.checkpoint.reader import in_memory, open_checkpoint
from models.families import hf
from pruning.methods import METHODS
from pruning.types import Request
from reference import synthetic

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs")]

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = synthetic.LARGE | {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "vocab_size": 512,
}
BLOCK = 4 * sum(
    s.shape[0] * (s.shape[1] if len(s.shape) > 1 else 1)
    for s in jax.tree.leaves(hf.specs(CONFIG)[2][0], is_leaf=hf.is_spec)
)
FEW = 4  # blocks
ROOM = 2 * BLOCK


class Run(NamedTuple):
    """Peak bytes of a process, and of its arrays."""

    process: int
    arrays: int


def run(directory: pathlib.Path, blocks: int, *flags: str) -> Run:
    model = synthetic.write(directory / "model", CONFIG | {"num_hidden_layers": blocks})
    tokens = f"{model}/tokens.npy"
    data = [
        f"--model={model}",
        f"--calibration={tokens}",
        f"--eval_data={tokens}",
        "--calibration_batch=2",
        "--check=topiary",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PYTHONPATH": str(ROOT),
        # Freed arrays return to the system at once, where glibc would keep them in fragments.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "MALLOC_TRIM_THRESHOLD_": str(2**20),
    }
    script = [sys.executable, str(ROOT / "tests/reference/frugal.py"), str(ROOM)]
    with subprocess.Popen(
        [*script, *data, f"--output={directory / 'out'}", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    shutil.rmtree(directory)
    return Run(usage.ru_maxrss * 1024, json.loads(said.splitlines()[-1])["most"])


@pytest.mark.parametrize(
    ("flags", "many"),
    [
        (["--method=wanda", "--sparsity=0.5"], 24),
        (["--method=sleb(blocks=1, device_gib=0, host_gib=0)"], 12),
        (["--method=wanda", "--sparsity=0.5", "--recover=blocks(steps=2)"], 36),
    ],
    ids=["one walk", "a search", "recovery"],
)
def test_memory_does_not_grow_with_the_number_of_blocks(
    flags: list[str], many: int, tmp_path: pathlib.Path
) -> None:
    a, b = (run(tmp_path / str(n), n, *flags) for n in (FEW, many))
    assert b.arrays - a.arrays < BLOCK
    assert b.process - a.process < (many - FEW) * BLOCK / 5


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_smollm2_is_the_same_streamed_or_in_memory(method: str, smollm2: pathlib.Path) -> None:
    """Every weight, bit for bit."""
    model, windows = (
        open_checkpoint(smollm2).model,
        np.random.default_rng(0).integers(0, 49152, (4, 64), np.int32),
    )
    assert isinstance(model.blocks, LazyBlocks)
    kept: list[dict[str, np.ndarray]] = []

    def put(i: int, block: Block) -> None:
        kept.append({s.name: np.asarray(getattr(block, s.name).w) for s in model.arch.slots})

    def compare(i: int, block: Block) -> None:
        for name, w in kept[i].items():
            np.testing.assert_array_equal(getattr(block, name).w, w, err_msg=f"block {i}, {name}")

    for which, sink in ((model, put), (in_memory(model), compare)):
        METHODS[method]().run(which, windows, Request(0.5), Runtime(batch=2), sink)
    assert len(kept) == 30 and all((w == 0).mean() > 0.45 for w in kept[-1].values())
