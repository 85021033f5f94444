"""The best candidates of each phase are judged by their loss after the repair."""

from typing import Any

import numpy as np
import pytest

from calibration.runtime import Runtime
from models.errors import InputError
from pruning.structured.sleb import Sleb
from pruning.types import Request, prune
from reference import small
from reference.sleb import TOKENS, deep, loss


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["refit", "flatten"])
def test_the_finalist_of_lowest_repaired_loss_goes(repair: Any) -> None:
    m = deep("llama-gqa", 6)
    method = Sleb(blocks=2, repair=repair, finalists=3)
    outcome = prune(m, method, TOKENS, Request(0.0), Runtime(batch=3))[1]
    removed: list[int] = []
    for losses, found, chosen in zip(
        outcome.details["losses"],
        outcome.details["repaired_losses"],
        outcome.details["removal_order"],
        strict=True,
    ):
        finalists = sorted((v, u) for u, v in enumerate(losses) if v is not None)[:3]
        want: dict[int, float] = {}
        for _, u in finalists:
            given = Sleb(remove=[*removed, u], repair=repair)
            repaired, _ = prune(m, given, TOKENS, Request(0.0), Runtime(batch=3))
            want[u] = loss(m, repaired.blocks)
        got = {u: v for u, v in enumerate(found) if v is not None}
        assert got.keys() == want.keys() and chosen == min(want, key=lambda u: want[u])
        np.testing.assert_allclose([got[u] for u in want], [*want.values()], rtol=1e-4)
        removed.append(chosen)


@pytest.mark.parametrize(
    "options", [{"search": "similarity"}, {"repair": "none"}, {"remove": [1]}], ids=str
)
def test_finalists_without_a_greedy_search_and_a_repair_are_bad_input(options: Any) -> None:
    method = Sleb(finalists=2, **options)
    with pytest.raises(InputError, match="finalists=2 of sleb is for the greedy search with a"):
        method.check(small.model("llama"), Request(0.3))
