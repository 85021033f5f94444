"""FLAP, Wanda-sp and magnitude-sp against goldens of the authors' own code, every stored run."""

import pathlib
from typing import Any

import numpy as np
import pytest

from eval.perplexity import perplexity
from pruning.methods import METHODS
from pruning.types import Request, prune
from reference.golden import golden, index, tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs")]

RUNS = [
    *(
        f"flap-{m}-{s}-{r}"
        for m in ("IFV", "WIFV", "WIFN")
        for s in ("UL-UM", "UL-MM", "AL-MM", "AL-AM")
        for r in ("0.2", "0.5")
    ),
    *(f"flap-WIFV-{s}-0.5-rh5" for s in ("UL-MM", "AL-MM")),
    "wanda_sp-0.2",
    "mag_sp-0.2",
]


def arguments(entry: dict[str, Any]) -> dict[str, Any]:
    """Return our arguments for a golden's settings."""
    if entry["method"] != "flap":
        return {}
    s = entry["settings"]
    return {
        "metric": s["metrics"],
        "structure": s["structure"],
        "heads_removed": s["remove_heads"],
        "variant": "official",
    }


@pytest.mark.parametrize("variant", RUNS)
def test_units_metrics_biases_and_perplexity_equal_the_golden_run(
    shared: pathlib.Path, variant: str
) -> None:
    """Kept units to the last one."""
    r, want, entry = (
        tiny(shared, "tiny-llama"),
        golden(shared, "tiny-llama", variant),
        index(shared)["tiny-llama", variant],
    )
    method = METHODS[{"mag_sp": "magnitude_sp"}.get(entry["method"], entry["method"])](
        **arguments(entry)
    )
    model, outcome = prune(
        r.model, method, r.calibration, Request(entry["settings"]["pruning_ratio"])
    )
    for i, block in enumerate(model.blocks):
        assert outcome.details["kept_heads"][i] == np.flatnonzero(want["attn_mask"][i]).tolist()
        assert outcome.details["kept_neurons"][i] == np.flatnonzero(want["mlp_mask"][i]).tolist()
        if entry["method"] == "flap":
            for slot, prefix in (("o", "attn"), ("down", "mlp")):
                np.testing.assert_allclose(
                    outcome.scores[i][slot], want[f"{prefix}_metric_raw"][i], rtol=1e-4
                )
                bias = getattr(block, slot).b
                np.testing.assert_allclose(
                    0 if bias is None else bias, want[f"{slot}_bias"][i], atol=1e-6
                )
    assert perplexity(model, r.evaluation, batch=8).value == pytest.approx(entry["ppl"], rel=1e-4)
