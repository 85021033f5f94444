"""Blocks whose inputs are most alike go, each compared with the block it would be merged into."""

from typing import Any

import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Model, embed
from models.errors import InputError
from pruning.structured.sleb import Sleb
from pruning.structured.sleb_paths import Unit
from pruning.structured.sleb_similarity import similar_blocks
from pruning.types import Outcome, Request, prune
from reference import small
from reference.sleb import TOKENS, deep


def run(m: Model, n: int, batch: int = 3, **options: Any) -> Outcome:
    method = Sleb(blocks=n, search="similarity", repair="none", **options)
    return prune(m, method, TOKENS, Request(0.0), Runtime(batch=batch))[1]


def cosine_matrix(m: Model) -> np.ndarray:
    """Mean cosines of the inputs of all blocks, in float64."""
    inputs, x = [], embed(m.arch, m.non_block, TOKENS)
    for block in m.blocks:
        inputs.append(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
        x, _ = small.run_block(m, block, x)
    unit = np.stack([a / np.linalg.norm(a, axis=1, keepdims=True) for a in inputs])
    return np.einsum("itd,jtd->ij", unit, unit) / unit.shape[1]


def test_the_most_similar_neighbours_are_merged_greedily() -> None:
    """Rows and columns of merged blocks leave the matrix."""
    m = deep("llama-gqa")
    cosines = cosine_matrix(m)
    want, left = [], list(range(8))
    for _ in range(4):
        at = max(range(len(left) - 1), key=lambda k: cosines[left[k], left[k + 1]])
        if left[at + 1] == 7:  # the latter barrier
            at = max(range(len(left) - 2), key=lambda k: cosines[left[k], left[k + 1]])
        want.append(left.pop(at + 1))
    outcome = run(m, 4)
    assert outcome.details["removal_order"] == want
    got = outcome.details["influence"]
    np.testing.assert_allclose(got[1:], 1 - np.diag(cosines, 1), atol=1e-6)


def test_a_block_is_compared_with_the_input_of_the_merged_one() -> None:
    units = {i: Unit(i, ()) for i in range(1, 4)}
    cosines = {(0, 1): 0.5, (1, 2): 0.9, (2, 3): 0.8, (0, 2): 0.1, (0, 3): 0.1, (1, 3): 0.4}
    assert similar_blocks(cosines, 4, units, 2) == [2, 1]
    assert similar_blocks(cosines | {(1, 3): 0.6}, 4, units, 2) == [2, 3]


def test_the_first_block_is_never_merged_into_another() -> None:
    outcome = run(deep("llama-gqa"), 7, early_barrier=0, latter_barrier=0)
    assert outcome.kept_blocks == (0,)
    with pytest.raises(InputError, match="ask for 6 or fewer"):
        run(deep("llama-gqa"), 7, early_barrier=0)
