"""SLEB's evolution: sets of the same size, the best of all on a small model, and resumption."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.journal import Journal
from calibration.runtime import Runtime
from pruning.methods import METHODS
from pruning.structured import sleb_evolution
from pruning.structured.sleb_evolution import swap
from pruning.types import Outcome, Request, prune
from reference.sinks import NoBlocks
from reference.small import logits, model, tokens


def run(blocks: int = 1, runtime: Runtime = Runtime(batch=2), **options: Any) -> Outcome:  # noqa: B008, frozen
    method = METHODS["sleb"](
        blocks=blocks,
        early_barrier=0,
        latter_barrier=0,
        search="evolution",
        repair="none",
        **options,
    )
    return prune(model("llama"), method, tokens(), Request(0.5), runtime)[1]


def divergence(removed: int) -> float:
    """Return the mean divergence of the model without a block from the dense one."""
    m = model("llama")
    left = m._replace(blocks=tuple(b for i, b in enumerate(m.blocks) if i != removed))
    log_p, log_q = (jax.nn.log_softmax(logits(x, tokens())) for x in (m, left))
    return float((jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("seed", range(5))
def test_swaps_keep_the_number_of_units(seed: int) -> None:
    rng, units = np.random.default_rng(seed), list(range(2, 12))
    removed = [3, 4, 9]
    for _ in range(50):
        new = swap(removed, units, rng)
        assert len(set(new)) == 3 and new == sorted(new) and set(new) <= set(units)
        assert 1 <= len({*new} - {*removed}) <= 3
        removed = new


def test_the_block_whose_absence_changes_least_is_found() -> None:
    outcome, every = run(), [divergence(i) for i in range(3)]
    assert outcome.details["removal_order"] == [int(np.argmin(every))]
    assert outcome.details["divergences"][-1] == pytest.approx(min(every), rel=1e-4)
    assert outcome.kept_blocks == tuple(i for i in range(3) if i != np.argmin(every))


def test_divergences_never_rise_and_follow_the_seed() -> None:
    outcome = run(units="sublayers", blocks=3)
    values = outcome.details["divergences"]
    assert values == sorted(values, reverse=True)
    assert run(units="sublayers", blocks=3).details == outcome.details


def test_an_evolution_that_was_killed_goes_on_to_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(units="sublayers", blocks=2)
    evolution = sleb_evolution._Evolution
    generation, tried = evolution.generation, []

    def killed(self: Any, number: int, *rest: Any) -> Mapping[str, Any]:
        tried.append(number)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return generation(self, number, *rest)

    monkeypatch.setattr(evolution, "generation", killed)
    with pytest.raises(KeyboardInterrupt):
        run(2, Runtime(2, journal=Journal(tmp_path / "j", {}, NoBlocks())), units="sublayers")
    again = run(2, Runtime(2, journal=Journal(tmp_path / "j", {}, NoBlocks())), units="sublayers")
    assert tried[:4] == [0, 1, 2, 2]
    assert again.details["removal_order"] == whole.details["removal_order"]
    assert again.details["divergences"] == whole.details["divergences"]
