"""ADMM over a block and a model: targets by family, budgets, variants, what it composes with."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Model, embed
from models.errors import InputError
from models.sharding import make_mesh
from pruning.allocation.owl import Owl
from pruning.methods import METHODS
from pruning.types import Request, prune
from pruning.weights import patterns
from pruning.weights.admm_block import error_sources
from pruning.weights.dsnot import DSnoT
from reference import admm as reference
from reference.small import model, tokens, weight, zeros

SERIAL = [
    ("attn_in", ["q", "k", "v"]),
    ("attn_mid", ["o"]),
    ("mlp_in", ["gate", "up"]),
    ("mlp_mid", ["down"]),
]
PLAIN = [*SERIAL[:2], ("mlp_in", ["up"]), SERIAL[3]]
PARALLEL = [("attn_in", ["q", "k", "v", "up"]), SERIAL[1], SERIAL[3]]
# Stages of a family, the slot that makes good the branch before it, and the scale of branches.
FAMILIES: Mapping[str, tuple[Any, str, float]] = {
    "llama": (SERIAL, "down", 1.0),
    "granite": (SERIAL, "down", 0.5),
    "phi": (PARALLEL, "down", 1.0),
    "gemma2": (SERIAL, "", 1.0),
}
slow = pytest.mark.slow


def blocks_of(m: Model, request: Request, **arguments: Any) -> Any:
    return prune(m, METHODS["admm"](**arguments), tokens(), request, Runtime(batch=4))[0].blocks


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=slow) for f in FAMILIES if f != "llama")]
)
def test_a_block_is_solved_in_turn_toward_the_dense_block(family: str) -> None:
    m, (stages, last, scale) = model(family), FAMILIES[family]
    x = embed(m.arch, m.non_block, tokens())
    got = blocks_of(m, Request(0.5))[0]
    want = reference.solve_block(m, m.blocks[0], x, stages, last, 0.5, scale)
    for slot, w in want.items():
        assert np.array_equal(weight(got, slot) == 0, w == 0), slot
        np.testing.assert_allclose(
            weight(got, slot), w, rtol=0, atol=1e-3 * np.abs(w).max(), err_msg=slot
        )
