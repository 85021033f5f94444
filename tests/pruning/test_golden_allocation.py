"""OWL, AlphaPruning, NeuroAL and DSnoT against results of the official code.

With Wanda, magnitude and MULTIFLOW the scores of every lambda are reproduced. With SparseGPT they
cannot be: on tiny-opt the same code with another micro-batch gives scores 1 to 2 % apart, and the
two best lambdas lie 1.4 % (at 0.7) and 0.17 % (at 0.6) apart.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from eval.perplexity import perplexity
from models.arch import Model
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from pruning.types import Outcome, Request, prune
from reference.golden import Reference, bits, tiny
from reference.small import zeros

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs")]

FOLDER = "golden/sparsellm_neuroal"
NOISY = {"tiny-llama": 0.02, "tiny-opt": 0.05}  # SparseGPT's trials
NEUROAL = [
    ("tiny-llama", "neuroal-both-multiflow-0.6"),
    ("tiny-llama", "neuroal-row-magnitude-0.6"),
    ("tiny-llama-gqa", "neuroal-both-wanda-0.7"),
    ("tiny-opt", "neuroal-both-magnitude-0.7"),
    ("tiny-opt", "neuroal-block-sparsegpt-0.6"),
]


def read(
    shared: pathlib.Path, model: str, variant: str
) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """One golden's settings and arrays."""
    entries = json.loads((shared / FOLDER / "index.json").read_text())["entries"]
    entry = next(e for e in entries if (e["model"], e["variant"]) == (model, variant))
    return entry, np.load(shared / FOLDER / entry["file"])


def run(r: Reference, entry: Mapping[str, Any], **options: Any) -> tuple[Model, Outcome]:
    method = METHODS[entry["method"]](
        **({"scope": "row"} if entry["method"] == "magnitude" else {})
    )
    return prune(r.model, method, r.calibration, Request(entry["sparsity"], **options))


def assert_perplexity(r: Reference, model: Model, want: float, rel: float) -> None:
    assert perplexity(model, r.evaluation, batch=8).value == pytest.approx(want, rel=rel)


def asked(outcome: Outcome) -> np.ndarray:
    return np.array([f for block in outcome.asked for f in block.values()])


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_owl_agrees_with_the_official_code(shared: pathlib.Path, name: str) -> None:
    (entry, want), r = read(shared, name, "owl-wanda-0.7"), tiny(shared, name)
    model, outcome = run(r, entry, allocation=ALLOCATIONS["owl"](m=5, lam=0.08, variant="official"))
    np.testing.assert_allclose(
        100 * np.array(outcome.details["outliers"]), want["owl_outlier_percent"], rtol=1e-5
    )
    np.testing.assert_allclose(asked(outcome), want["dist_per_linear"], atol=1e-6)
    assert_perplexity(r, model, entry["ppl"], 1e-4)


@pytest.mark.parametrize(("name", "epsilon"), [("tiny-llama", "0.1"), ("tiny-opt", "0.3")])
def test_alpha_agrees_with_the_official_code(shared: pathlib.Path, name: str, epsilon: str) -> None:
    """On tiny-opt at 0.3 the official code asks for 1.04 of the first block, which is all of it."""
    (entry, want), r = read(shared, name, f"alpha-wanda-0.7-eps{epsilon}"), tiny(shared, name)
    model, outcome = run(
        r, entry, allocation=ALLOCATIONS["alpha"](epsilon=float(epsilon), variant="official")
    )
    got = [x for block in outcome.details["alpha"] for x in block.values()]
    np.testing.assert_allclose(got, want["alpha_per_linear"], rtol=1e-4)
    np.testing.assert_allclose(asked(outcome), np.minimum(want["dist_per_linear"], 1), atol=1e-5)
    assert_perplexity(r, model, entry["ppl"], 1e-4)


@pytest.mark.parametrize(("name", "variant"), NEUROAL)
def test_neuroal_agrees_with_the_official_code(
    shared: pathlib.Path, name: str, variant: str
) -> None:
    (entry, want), r = read(shared, name, variant), tiny(shared, name)
    model, outcome = run(
        r, entry, allocation=ALLOCATIONS["neuroal"](step=entry["step"], variant="official")
    )
    d, exact = outcome.details, entry["method"] != "sparsegpt"
    rtol = 1e-3 if exact else NOISY[name]
    for step in ("block", "row"):
        if f"{step}_scores" in want:
            np.testing.assert_allclose(d[f"{step}_lambdas"], want[f"{step}_lambdas"])
            np.testing.assert_allclose(d[f"{step}_scores"], want[f"{step}_scores"], rtol=rtol)
            assert d[f"{step}_lambda"] == entry[f"best_lambda_{step}"] or not exact
    if exact:
        key = "block_dist_chosen" if entry["step"] == "block" else "linear_sparsity"
        np.testing.assert_allclose(
            d["block_sparsity"] if entry["step"] == "block" else asked(outcome),
            want[key],
            atol=1e-3,
        )
    assert_perplexity(r, model, entry["ppl"], 2e-3)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_dsnot_agrees_with_the_official_code(shared: pathlib.Path, name: str) -> None:
    """To the bit with these micro-batches.

    Others flip one near tie of 5e-8 in tiny-llama, which changes 4 % of the next block's bits and
    4.5e-3 of perplexity.
    """
    (entry, want), r = read(shared, name, "dsnot-wanda-0.7"), tiny(shared, name)
    model, _ = run(r, entry, refine=REFINEMENTS["dsnot"](variant="official"))
    same = []
    for i, (names, gone) in enumerate(zip(r.names, zeros(model), strict=True)):
        for slot, linear in names.items():
            key = f"mask/{i}/" + linear.split(".", 2)[2]
            if key in want:
                same.append(np.mean(gone[slot] == bits(want[key], gone[slot].shape)))
    assert len(same) == 4 * len(r.model.blocks) and min(same) >= 0.9999, same
    assert_perplexity(r, model, entry["ppl"], 2e-3)
