"""SparseGPT and MULTIFLOW against results of the official code, from the same weights and tokens.

SparseGPT's masks are not reproducible to the bit: with another number of threads the official code
flips a share NOISE of all mask bits at half and in groups. At 0.7 its own sensitivity
(sensitivity.json: weights changed by a relative 1e-7) is 3e-4 to 9e-4 in the
third block of tiny-llama and 2.6e-3 to 7.9e-3 in that of tiny-opt.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from eval.perplexity import perplexity
from models.arch import Model
from reference.golden import (
    SPARSITY,
    Reference,
    assert_perplexity,
    bits,
    golden,
    load,
    pruned,
    tiny,
)
from reference.small import zeros

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs")]

NOISE = {"0.5": 5e-4, "0.7": 1.5e-3, "2of4": 1.4e-2, "4of8": 1.4e-2}
TINY = pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])


def pairs(
    r: Reference, model: Model, want: Mapping[str, np.ndarray]
) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """(block, slot, our zeros, theirs) for every mask that is stored."""
    for i, (names, got) in enumerate(zip(r.names, zeros(model), strict=True)):
        for slot, linear in names.items():
            if f"mask:{linear}" in want:
                yield i, slot, got[slot], bits(want[f"mask:{linear}"], got[slot].shape)


def check_sparsegpt(r: Reference, want: Mapping[str, np.ndarray], variant: str) -> None:
    """Compare perplexity, masks of the first block, and masks of all blocks more loosely."""
    model = pruned(r, "sparsegpt", variant)
    assert_perplexity(r, model, want["window_ce"], rtol=2e-3)
    differing, size = 0, 0
    for i, slot, ours, theirs in pairs(r, model, want):
        if i == 0 and slot in ("q", "k", "v") and SPARSITY[variant][1] is None:
            assert np.mean(ours == theirs) >= 0.9999, slot
        differing, size = differing + np.sum(ours != theirs), size + ours.size
    assert differing <= 3 * NOISE[variant] * size


@pytest.mark.parametrize("variant", NOISE)
@TINY
def test_sparsegpt_agrees_with_the_official_code(
    shared: pathlib.Path, name: str, variant: str
) -> None:
    check_sparsegpt(tiny(shared, name), golden(shared, name, f"sparsegpt-{variant}"), variant)


def test_sparsegpt_of_the_first_block_of_smollm2(
    shared: pathlib.Path, smollm2: pathlib.Path
) -> None:
    """Weights changed by a relative 1e-7 flip 1.3e-2 of the bits of down two blocks later."""
    r = load(smollm2, shared / "golden/tokens/smollm2")
    first = dataclasses.replace(
        r, model=r.model._replace(blocks=r.model.blocks[:1]), names=r.names[:1]
    )
    want = golden(shared, "smollm2", "sparsegpt-0.5")
    compared = {
        slot: np.mean(ours == theirs)
        for _, slot, ours, theirs in pairs(first, pruned(first, "sparsegpt", "0.5"), want)
    }
    assert len(compared) == len(r.model.arch.slots)
    assert all(
        share >= (0.997 if slot == "down" else 0.9998) for slot, share in compared.items()
    ), compared


@TINY
def test_multiflow_agrees_with_the_official_code(shared: pathlib.Path, name: str) -> None:
    """Perplexity over all windows, to a relative 1e-4, and the two masks that are stored."""
    folder = shared / "golden/sparsellm_neuroal"
    entries = {
        (e["model"], e["variant"]): e
        for e in json.loads((folder / "index.json").read_text())["entries"]
    }
    entry, r = entries[name, "uniform-multiflow-0.7"], tiny(shared, name)
    model, want = pruned(r, "multiflow", "0.7"), np.load(folder / entry["file"])
    got = perplexity(model, r.evaluation, batch=4).cross_entropy
    assert np.exp(np.mean(got)) == pytest.approx(entry["ppl"], rel=1e-4)
    compared = 0
    for i, (names, gone) in enumerate(zip(r.names, zeros(model), strict=True)):
        for slot, linear in names.items():
            key = f"mask/{i}/" + linear.split(".", 2)[2]
            if key in want:
                compared += 1
                assert np.mean(gone[slot] == bits(want[key], gone[slot].shape)) >= 0.9999, linear
    assert compared == 2
