"""A walk over the micro-batches of a block leaves all values on the devices."""

from typing import Any

import jax
import numpy as np
import pytest

from calibration.passes import observe
from calibration.runtime import Runtime
from launch.flags import calls
from models.arch import Model
from models.checkpoint.blocks import ShapeBlocks
from models.checkpoint.reader import abstract
from models.families import hf
from models.programs import ShapeRecorder, record_programs
from models.sharding import make_mesh
from pruning.methods import METHODS
from pruning.types import Request, prune
from reference.small import CONFIGS, model, tokens

# Not SLEB and 2SSP: a candidate that cannot win is stopped, so its bounds are read on the way.
METHODS_AND_SPARSITIES = {
    "wanda": 0.5,
    "ria": 0.5,
    "sparsegpt": 0.5,
    "sparsellm": 0.5,
    "admm": 0.5,
    "llmrank": 0.3,
    "flap": 0.3,
    "minitron": 0.3,
}


def values_read(method: str, sparsity: float, windows: int) -> int:
    """Return how often host code asks for a value in a run on shapes, a window a micro-batch."""
    arch, non_block, specs = hf.specs(CONFIGS["llama"])
    shapes = abstract(arch, non_block, specs, jax.numpy.float32)
    shaped = Model(arch, shapes.non_block, ShapeBlocks(specs, jax.numpy.float32))
    recorder = ShapeRecorder(make_mesh("", 1, jax.local_devices()[:1]))
    with record_programs(recorder):
        built = calls.build("method", method, METHODS)
        prune(shaped, built, tokens()[:windows], Request(sparsity), Runtime(1))
    return recorder.values_read


@pytest.mark.parametrize("method", METHODS_AND_SPARSITIES)
def test_no_micro_batch_makes_the_host_wait(method: str) -> None:
    """The host reads a block's results, as often for six micro-batches as for two."""
    sparsity = METHODS_AND_SPARSITIES[method]
    assert values_read(method, sparsity, 2) == values_read(method, sparsity, 6)


def test_micro_batches_take_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a guard that refuses every transfer that was not asked for."""
    guarded: list[str] = []

    def under_guard(*args: Any, **options: Any) -> Any:
        guarded.append("observe")
        with jax.transfer_guard("disallow"):
            return observe(*args, **options)

    monkeypatch.setattr("calibration.passes.observe", under_guard)
    windows = np.asarray(tokens()[:4])
    for method, sparsity in (("wanda", 0.5), ("sparsegpt", 0.5), ("flap", 0.3)):
        built = calls.build("method", method, METHODS)
        prune(model("llama"), built, windows, Request(sparsity), Runtime(2))
    assert guarded
