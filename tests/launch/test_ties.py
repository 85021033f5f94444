"""Equal scores and dead inputs: the budget is met, or the report says that it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference import tiny
from reference.prune_runs import call, report_of

pytestmark = pytest.mark.usefixtures("no_samples", "no_transformers")
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (4, 24), np.int32)
State = dict[str, np.ndarray]


def equal(state: State) -> State:
    """Give every matrix of the blocks one value."""
    return {n: np.full_like(x, 0.1) if "proj" in n else x for n, x in state.items()}


def dead(state: State) -> State:
    """Silence every channel that enters the first block."""
    return state | {"model.layers.0.input_layernorm.weight": np.zeros(32, np.float32)}


def pruned(root: Path, change: Callable[[State], State], method: str, share: float) -> Any:
    state = tiny.state_of(tiny.GQA, tiny.random_model(tiny.GQA))
    model, tokens = tiny.write(root / "model", change(state)), root / "tokens.npy"
    np.save(tokens, TOKENS)
    data = [f"--calibration={tokens}", f"--eval_data={tokens}", "--mesh=data=1"]
    more = [f"--method={method}", f"--sparsity={share}", f"--output={root / 'out'}"]
    assert call([f"--model={model}", *data, *more]) == 0
    return report_of(root / "out")


def test_magnitude_meets_its_budget_with_equal_weights(tmp_path: Path) -> None:
    report = pruned(tmp_path, equal, "magnitude", 0.5)
    assert set(report["sparsity"]["per_linear"].values()) == {0.5}
    assert report["warnings"] == []


@pytest.mark.slow
def test_official_flap_with_equal_scores_says_that_it_removed_all(tmp_path: Path) -> None:
    report = pruned(tmp_path, equal, 'flap(variant="official", metric="WIFN")', 0.3)
    assert report["sparsity"]["prunable"] > 0.5
    said = " | ".join(report["warnings"])
    assert "the target was 30%" in said and "hold zeros alone" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegpt", "sparsellm", 'sparsellm(variant="official")'])
def test_matrices_that_solvers_empty_are_named(method: str, tmp_path: Path) -> None:
    report = pruned(tmp_path, dead, method, 0.3)
    (said,) = [w for w in report["warnings"] if "hold zeros alone" in w]
    assert "model.layers.0.self_attn.q_proj" in said
    (missed,) = [w for w in report["warnings"] if "lost another share" in w]
    assert "100% for 30%" in missed
