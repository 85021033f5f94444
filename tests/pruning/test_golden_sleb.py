"""SLEB against goldens of the authors' own code: orders, every loss, perplexities."""

import pathlib

import numpy as np
import pytest

from calibration.runtime import Runtime
from eval.perplexity import perplexity
from models.arch import Model
from pruning.methods import METHODS
from pruning.types import Outcome, Request, prune
from reference.golden import Reference, golden, index, load, tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs")]


def removed(r: Reference, rows: int, **arguments: object) -> tuple[Model, Outcome]:
    """Run SLEB with the official micro-batches of four."""
    method = METHODS["sleb"](**arguments)
    return prune(r.model, method, r.calibration[:rows], Request(0.0), Runtime(batch=4))


def assert_golden(shared: pathlib.Path, name: str, variant: str, r: Reference) -> None:
    """Assert that the order, every loss and the perplexity agree with a golden."""
    want, entry = golden(shared, name, variant), index(shared)[name, variant]
    s = entry["settings"]
    arguments = {
        "blocks": s["num_remove_blocks"],
        "early_barrier": s["early_barrier"],
        "latter_barrier": s["latter_barrier"],
    }
    model, outcome = removed(r, s["nsamples"], **arguments, variant="official")
    assert outcome.details["removal_order"] == want["removal_order"].tolist()
    losses = np.array(outcome.details["losses"], float)
    np.testing.assert_allclose(losses, want["candidate_loss"], rtol=1e-4, equal_nan=True)
    assert outcome.kept_blocks == tuple(
        i for i in range(s["num_blocks"]) if i not in want["removal_order"]
    )
    assert perplexity(model, r.evaluation, batch=4).value == pytest.approx(entry["ppl"], rel=1e-4)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_tiny_models_lose_the_blocks_of_the_golden_run(shared: pathlib.Path, name: str) -> None:
    assert_golden(shared, name, "sleb-remove2", tiny(shared, name))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_the_corrected_variant_removes_the_same_blocks(shared: pathlib.Path, name: str) -> None:
    _, outcome = removed(tiny(shared, name), 16, blocks=2)
    assert (
        outcome.details["removal_order"]
        == golden(shared, name, "sleb-remove2")["removal_order"].tolist()
    )


def test_smollm2_loses_the_blocks_of_the_golden_run(
    shared: pathlib.Path, smollm2: pathlib.Path
) -> None:
    assert_golden(
        shared, "smollm2", "sleb-remove3", load(smollm2, shared / "golden/tokens/smollm2")
    )
