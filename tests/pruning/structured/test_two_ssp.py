"""2SSP removes neurons alike everywhere, then the attention parts that are missed least."""

import pathlib

import jax
import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Model, embed, linear_of
from models.checkpoint.reader import open_checkpoint
from models.errors import InputError
from models.sharding import make_mesh
from models.surgery import cut
from pruning.structured.minitron_core import BlockSize
from pruning.structured.sleb_runner import silenced
from pruning.structured.two_ssp import TwoSSP, attentions_to_remove
from pruning.types import Request, prune
from reference import tiny, torch_models
from reference import two_ssp as port
from reference.small import (
    CONFIGS,
    EVERY_FAMILY,
    MORE_CONFIGS,
    logits,
    model,
    run_block,
    same,
    tokens,
)

ALL = {**CONFIGS, **MORE_CONFIGS}
PLAIN = TwoSSP(attentions=1, windows=0, repair="none")


def loss(m: Model, windows: np.ndarray) -> float:
    """Return the sum over windows of the mean cross-entropy, in float64."""
    z = logits(m, windows).astype(np.float64)[:, :-1]
    z -= z.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(z, windows[:, 1:, None].astype(int), axis=-1)[..., 0]
    return float((np.log(np.exp(z).sum(axis=-1)) - chosen).mean(axis=1).sum())


@pytest.mark.parametrize("family", ["llama-gqa", pytest.param("opt", marks=pytest.mark.slow)])
def test_the_neurons_of_largest_mean_norm_stay(family: str) -> None:
    m = model(family)
    _, outcome = prune(m, PLAIN, tokens(), Request(0.4), Runtime(batch=4))
    x = embed(m.arch, m.non_block, tokens())
    for i, block in enumerate(m.blocks):
        x, taps = run_block(m, block, x)
        reader = m.arch.group("neurons").reader.name
        want = port.neuron_scores(taps[m.arch.tap(reader)])
        np.testing.assert_allclose(outcome.scores[i][reader], want, rtol=1e-5)
        kept = outcome.details["kept_neurons"][i]
        assert kept == sorted(np.argsort(-want)[: len(kept)].tolist())


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.5, 0.7])
def test_counts_are_those_of_the_authors(sparsity: float) -> None:
    """On the shapes of SmolLM2-135M: 30 blocks, 3 head groups, 1536 neurons, 576 channels."""
    attention, feed_forward = 2 * 576 * (576 + 192), 3 * 576 * 1536
    parts, neurons = port.counts(30, attention, feed_forward, 1536, sparsity, 1.5)
    blocks = [BlockSize(3, 1536, attention // 576 // 3, 3)] * 30
    assert attentions_to_remove(blocks, sparsity, 1.5) == parts
    m = model("llama-gqa")
    assert TwoSSP(attentions=0)._plan(m, Request(0.25)).neurons == (14, 14, 14)
    kept = round(
        1536 - (sparsity * 30 * (attention + feed_forward) - parts * attention) / 30 / 1728
    )
    assert kept == neurons


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_the_attention_part_that_is_missed_least_goes(family: str) -> None:
    """The loss without each part, after the first stage, by a forward of the whole model."""
    m = model(family)
    pruned, outcome = prune(m, PLAIN, tokens(), Request(0.4), Runtime(batch=4))
    without, _ = prune(
        m, TwoSSP(attentions=0, repair="none"), tokens(), Request(0.0), Runtime(batch=4)
    )
    assert same(without.blocks, m.blocks)
    (removed,) = outcome.details["removed_attention"]
    group = m.arch.group("neurons")
    stage_one = []
    for block, kept in zip(m.blocks, outcome.details["kept_neurons"], strict=True):
        stage_one.append(cut(block, group, np.isin(np.arange(24), kept)))
    losses = []
    for i in range(3):
        blocks = [silenced(b, ("o",)) if k == i else b for k, b in enumerate(stage_one)]
        losses.append(loss(m._replace(blocks=tuple(blocks)), tokens()))
    assert removed == int(np.argmin(losses))
    found = outcome.details["losses"][0][removed]
    np.testing.assert_allclose(found, losses[removed] * 12, rtol=1e-4)
    best = [silenced(b, ("o",)) if k == removed else b for k, b in enumerate(stage_one)]
    np.testing.assert_allclose(
        logits(pruned, tokens()), logits(m._replace(blocks=tuple(best)), tokens()), atol=1e-5
    )


def held(m: Model) -> int:
    """Count the weights of linears that are not zero."""
    return sum(
        int((np.asarray(linear_of(b, s.name).w) != 0).sum())
        for b in m.blocks
        for s in m.arch.slots_of(b)
    )


@pytest.mark.parametrize(
    "family",
    [f if f == "llama-gqa" else pytest.param(f, marks=pytest.mark.slow) for f in EVERY_FAMILY],
)
def test_transformers_has_the_logits_of_blocks_without_attention(
    family: str, tmp_path: pathlib.Path
) -> None:
    m, request = model(family), Request(0.45)
    pruned, outcome = prune(m, TwoSSP(attentions=1), tokens(), request)
    assert len(outcome.details["removed_attention"]) == 1
    experts = m.arch.config.experts if m.arch.has_experts else 1
    multiple = 8 if m.arch.has_experts else 1
    unit = len(m.blocks) * 3 * 16 * experts * multiple
    assert abs(held(pruned) - 0.55 * held(m)) <= unit / 2
    want = logits(pruned, tokens())
    # The types' own padding tokens lie beyond so small a vocabulary.
    config = {"pad_token_id": 0, **ALL[family]}
    _, form = tiny.written(tmp_path / "out", pruned, config)
    assert form.code is not None
    again = open_checkpoint(tmp_path / "out")
    np.testing.assert_allclose(logits(again.model, tokens()), want, rtol=1e-4, atol=1e-4)
    pytest.importorskip("torch")
    theirs = torch_models.logits(torch_models.load(tmp_path / "out"), tokens())
    np.testing.assert_allclose(theirs, want, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_devices_do_not_matter() -> None:
    m = model("llama-gqa")
    method, request = TwoSSP(attentions=1, windows=0), Request(0.4)
    _, one = prune(m, method, tokens(8), request, Runtime(batch=8))
    mesh = make_mesh("data=4,model=2", 8)
    _, many = prune(m, method, tokens(8), request, Runtime(batch=8, mesh=mesh))
    assert jax.device_count() == 8
    assert one.removed == many.removed
    assert one.details["removed_attention"] == many.details["removed_attention"]


def test_requests_that_cannot_be_followed_are_refused() -> None:
    m = model("llama")
    for method, sparsity, message in (
        (TwoSSP(attentions=3), 0.1, "cannot be met by two_ssp with 3 attention parts removed"),
        (TwoSSP(attentions=0), 0.9, "cannot be met by two_ssp with 0 attention parts removed"),
        (TwoSSP(attentions=4), 0.5, "is more than the 3 blocks"),
    ):
        with pytest.raises(InputError, match=message):
            method.check(m, Request(sparsity))
    with pytest.raises(InputError, match="must be above 0"):
        TwoSSP(alpha=0.0)
    post = tiny.random_model({**tiny.OPT_350M, "word_embed_proj_dim": 32})
    with pytest.raises(InputError, match="here a norm follows"):
        TwoSSP(attentions=1).check(post, Request(0.5))
