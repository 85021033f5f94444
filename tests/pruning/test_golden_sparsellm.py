"""SparseLLM against results of the official code, and the corrected variant against SparseGPT.

The unit models are well-conditioned, so every mask and weight must agree. On tiny-opt the official
loop amplifies rounding without bound after its first iteration (QUIRKS2.md), so only that one is
compared.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.perplexity import perplexity
from models.arch import Block, Model
from models.families import hf
from pruning.methods import METHODS
from pruning.types import Outcome, Request, prune
from reference.golden import SPARSITY, bits, tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs")]

_UNIT = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
UNITS: Mapping[str, Mapping[str, Any]] = {
    "unit-llama": _UNIT
    | {
        "model_type": "llama",
        "intermediate_size": 160,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    "unit-opt": _UNIT | {"model_type": "opt", "ffn_dim": 160},
}
EPOCHS = 4


def stored(shared: pathlib.Path, name: str, variant: str) -> Mapping[str, np.ndarray]:
    """One golden's arrays."""
    return np.load(shared / "golden/sparsellm_neuroal" / name / f"sparsellm-{variant}.npz")


def linears(spec: Block, slots: tuple[Any, ...]) -> dict[str, str]:
    """{slot: name} of a block as these goldens have it, without the path to the block."""
    return {
        s.name: hf.linear_name(spec, s.name).split("layers.")[1].split(".", 1)[1] for s in slots
    }


def unit(name: str, want: Mapping[str, np.ndarray]) -> tuple[Model, list[dict[str, str]]]:
    """The model whose parameters the golden holds, and its blocks' linears."""
    arch, non_block, blocks = hf.specs(UNITS[name])
    names = [linears(spec, arch.slots) for spec in blocks]
    params = jax.tree.map(
        lambda s: jnp.asarray(want[f"init/{s.name}"], jnp.float32),
        (non_block, blocks),
        is_leaf=hf.is_spec,
    )
    return Model(arch, *params), names


def assert_losses(outcome: Outcome, want: np.ndarray, rtol: float) -> None:
    """The errors that the official code logged; NaN stands for an iteration that it leaves out."""
    for got, row in zip(outcome.details["loss"], want, strict=True):
        logged = row[np.isfinite(row)]
        assert len(got) == len(logged)
        np.testing.assert_allclose(got, logged, rtol=rtol)


@pytest.mark.usefixtures("plain_programs")
@pytest.mark.parametrize("variant", ["0.5", "2of4"])
@pytest.mark.parametrize("name", UNITS)
def test_every_weight_of_a_unit_model_agrees(shared: pathlib.Path, name: str, variant: str) -> None:
    """Masks to the bit, weights to 1e-4 of a matrix's largest; a gated block 1 is iterated once."""
    want = stored(shared, name, variant)
    model, names = unit(name, want)
    pruned, outcome = prune(
        model, METHODS["sparsellm"](variant="official"), want["tokens"], Request(*SPARSITY[variant])
    )
    for i, block in enumerate(pruned.blocks):
        for slot, linear in names[i].items():
            got, final = np.asarray(getattr(block, slot).w), want[f"weight/{i}/{linear}"]
            assert np.array_equal(got == 0, final == 0), (i, slot)
            np.testing.assert_allclose(
                got, final, rtol=0, atol=1e-4 * np.abs(final).max(), err_msg=f"{i} {slot}"
            )
    gated = name == "unit-llama"
    assert [len(x) for x in outcome.details["loss"]] == (
        [EPOCHS, 1, EPOCHS] if gated else [EPOCHS] * 3
    )
    assert outcome.details["iteration_kept"] == [len(x) - 1 for x in outcome.details["loss"]]
    if gated:
        assert_losses(outcome, want["train_loss"], 1e-4)


def test_two_iterations_agree_on_grouped_query_attention(shared: pathlib.Path) -> None:
    """Block 0. Rounding grows in p's pseudo-inverse at each iteration; later ones move masks."""
    r, want = tiny(shared, "tiny-llama-gqa"), stored(shared, "tiny-llama-gqa", "0.7")
    first = r.model._replace(blocks=r.model.blocks[:1])
    model, outcome = prune(
        first, METHODS["sparsellm"](variant="official", iterations=2), r.calibration, Request(0.7)
    )
    assert_losses(outcome, want["train_loss"][:1, :2], 1e-3)
    for slot in ("gate", "up", "down"):
        linear, got = (
            r.names[0][slot].split(".", 2)[2],
            np.asarray(getattr(model.blocks[0], slot).w),
        )
        theirs = bits(want[f"trace_mask_rows0to64/0/{linear}/1"], got[:64].shape)
        assert np.mean((got[:64] == 0) == theirs) >= 0.9995, slot
        rows = want[f"trace_w_after/0/{linear}/1"]
        np.testing.assert_allclose(
            got[:4], rows, rtol=0, atol=1e-3 * np.abs(rows).max(), err_msg=slot
        )


def test_the_first_iteration_agrees_on_tiny_opt(shared: pathlib.Path) -> None:
    """Block 0: masks of attention, and the feed-forward part after the first call of SparseGPT.

    fc2 has inputs that never fire, so rounding moves some of its mask, and the rest of that row.
    """
    r, want = tiny(shared, "tiny-opt"), stored(shared, "tiny-opt", "0.7")
    first = r.model._replace(blocks=r.model.blocks[:1])
    model, _ = prune(
        first, METHODS["sparsellm"](variant="official", iterations=1), r.calibration, Request(0.7)
    )
    for slot, path in r.names[0].items():
        linear, got = path.split(".", 2)[2], np.asarray(getattr(model.blocks[0], slot).w)
        traced = slot in ("fc1", "fc2")
        gone = (got[:64] if traced else got) == 0
        theirs = bits(
            want[f"trace_mask_rows0to64/0/{linear}/0" if traced else f"mask/0/{linear}"], gone.shape
        )
        assert np.mean(gone == theirs) >= (0.995 if slot == "fc2" else 0.999), slot
        if traced:
            rows = want[f"trace_w_after/0/{linear}/0"]
            equal = np.all((got[:4] == 0) == (rows == 0), axis=1)
            assert np.sum(equal) >= 3, slot
            np.testing.assert_allclose(
                got[:4][equal], rows[equal], rtol=0, atol=1e-3 * np.abs(rows).max(), err_msg=slot
            )


@pytest.mark.parametrize("variant", ["0.7", "2of4"])
def test_corrected_is_not_worse_than_sparsegpt_on_tiny_opt(
    shared: pathlib.Path, variant: str
) -> None:
    """The official code with one iteration is SparseGPT; four give ten times its perplexity."""
    r, index = (
        tiny(shared, "tiny-opt"),
        json.loads((shared / "golden/sparsellm_neuroal/index.json").read_text()),
    )
    (entry,) = [
        e
        for e in index["entries"]
        if (e["model"], e["variant"]) == ("tiny-opt", f"sparsegpt-plain-{variant}")
    ]
    model, _ = prune(r.model, METHODS["sparsellm"](), r.calibration, Request(*SPARSITY[variant]))
    assert perplexity(model, r.evaluation, batch=8).value <= entry["ppl"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("tiny-llama", "0.7"),
        ("tiny-llama-gqa", "0.7"),
    ],
)
def test_whole_models_as_far_as_the_official_code_agrees_with_itself(
    shared: pathlib.Path, name: str, variant: str
) -> None:
    """Perplexity to 1e-3, block 0's errors to 1e-2, and the mean distance of all logged errors.

    From block 1 on the official code differs from itself by up to 3.4 %, 0.9 % in the mean, when
    its weights change by 1e-7 (sensitivity.json). One error is off by 7 % where a choice between
    two masks falls the other way.
    """
    r, want = tiny(shared, name), stored(shared, name, variant)
    asked = Request(*SPARSITY[variant])
    model, outcome = prune(r.model, METHODS["sparsellm"](variant="official"), r.calibration, asked)
    index = json.loads((shared / "golden/sparsellm_neuroal/index.json").read_text())
    (entry,) = [
        e for e in index["entries"] if (e["model"], e["variant"]) == (name, f"sparsellm-{variant}")
    ]
    assert perplexity(model, r.evaluation, batch=8).value == pytest.approx(entry["ppl"], rel=1e-3)
    logged = [row[np.isfinite(row)] for row in want["train_loss"]]
    assert [len(x) for x in outcome.details["loss"]] == [len(row) for row in logged]
    np.testing.assert_allclose(outcome.details["loss"][0], logged[0], rtol=1e-2)
    off = [
        abs(np.asarray(x) - row) / row
        for x, row in zip(outcome.details["loss"][1:], logged[1:], strict=True)
    ]
    assert np.mean(np.concatenate(off)) <= 0.025
    assert np.max(np.concatenate(off)) <= 0.1
