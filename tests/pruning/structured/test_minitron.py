"""Minitron cuts one width everywhere; the stream's channels go through all that touches them."""

import json
import pathlib

import jax
import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Model, embed, linear_of
from models.checkpoint.output_format import preview
from models.checkpoint.reader import open_checkpoint
from models.errors import InputError
from models.families import hf
from models.sharding import make_mesh
from models.stream import cut_non_block, narrow_blocks
from pruning.structured.minitron import Minitron
from pruning.structured.minitron_scores import score_model
from pruning.types import Request, prune
from reference import minitron as port
from reference import tiny, torch_models
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
QUICK = ("llama", "opt")
every_family = pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in EVERY_FAMILY]
)


def parameters(m: Model) -> int:
    """Count the weights of the blocks' linears."""
    return sum(linear_of(b, s.name).w.size for b in m.blocks for s in m.arch.slots_of(b))


@pytest.mark.parametrize("family", ["llama-gqa", pytest.param("opt", marks=pytest.mark.slow)])
def test_scores_and_gains_are_those_of_the_port(family: str) -> None:
    m = model(family)
    records = score_model(m, tokens(), Runtime(batch=4))
    x = embed(m.arch, m.non_block, tokens())
    heads, neurons = (m.arch.group(name).reader for name in ("heads", "neurons"))
    outputs = []
    for block, record in zip(m.blocks, records, strict=True):
        x, taps = run_block(m, block, x)
        for name, reader in (("heads", heads), ("neurons", neurons)):
            want = port.unit_scores(taps[m.arch.tap(reader.name)], reader.width)
            np.testing.assert_allclose(np.sqrt(record["units"][name]), want, rtol=1e-5)
        outputs += [taps["attn_in"], taps["mlp_in"]]
        for tap in ("attn_in", "mlp_in"):
            seen = record["stream"][tap]
            np.testing.assert_allclose(seen["second"], (taps[tap] ** 2).mean((0, 1)), rtol=1e-5)
            np.testing.assert_allclose(seen["mean"], taps[tap].mean((0, 1)), rtol=1e-3, atol=1e-6)
    shares = np.asarray(x, np.float64) ** 2
    shares /= shares.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(records[-1]["final"], shares.sum((0, 1)), rtol=1e-5)
    _, outcome = prune(m, Minitron(hidden=0.5), tokens(), Request(0.7), Runtime(batch=4))
    best = np.argsort(-port.channel_scores(outputs))[:8]
    assert outcome.details["kept_channels"] == sorted(best.tolist())


def test_a_norm_over_fewer_channels_gives_what_it_gave() -> None:
    """RMS norms, with the factor that is measured from their outputs alone."""
    m = model("llama")
    pruned, outcome = prune(m, Minitron(hidden=0.5), tokens(), Request(0.6), Runtime(batch=4))
    keep = np.isin(np.arange(16), outcome.details["kept_channels"])
    x = embed(m.arch, m.non_block, tokens())
    want = port.norm_gain(np.asarray(x), keep)
    before, after = m.blocks[0].attn_norm.scale, pruned.blocks[0].attn_norm.scale
    np.testing.assert_allclose(np.asarray(after) / np.asarray(before)[keep], want, rtol=1e-4)
    plain, _ = prune(m, Minitron(hidden=0.5, gain=False), tokens(), Request(0.6))
    np.testing.assert_array_equal(plain.blocks[0].attn_norm.scale, np.asarray(before)[keep])
    for block in m.blocks:
        x, _ = run_block(m, block, x)
    final = np.asarray(pruned.non_block.norm.scale) / np.asarray(m.non_block.norm.scale)[keep]
    np.testing.assert_allclose(final, port.norm_gain(np.asarray(x), keep), rtol=1e-4)


def masked(m: Model, keep: np.ndarray) -> Model:
    """Return the model that never writes to the other channels of its stream."""
    rows = keep.astype(np.float32)
    blocks = []
    for block in m.blocks:
        new = {}
        for name in ("o", "down"):
            p = getattr(block, name)
            new[name] = p.replace(w=p.w * rows[:, None], b=None if p.b is None else p.b * rows)
        blocks.append(block.replace(**new))
    non_block = m.non_block.replace(embed=m.non_block.embed * rows[None, :])
    return m._replace(non_block=non_block, blocks=tuple(blocks))


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("olmo2", "qwen3"))],
)
def test_cut_channels_are_masked_channels(family: str) -> None:
    """A mask leaves the mean square over all channels; a gain makes up for that exactly."""
    # But for what is added to it, which counts where OLMo2 normalises small outputs of branches.
    m = model(family)._replace(arch=hf.specs({**ALL[family], "rms_norm_eps": 1e-12})[0])
    keep = np.isin(np.arange(16), [0, 2, 3, 7, 8, 9, 11, 15])
    root = float(np.sqrt(16 / 8))
    norms = ("attn_norm", "mlp_norm", "attn_out_norm", "mlp_out_norm")
    cut = m._replace(
        non_block=cut_non_block(m.arch, m.non_block, keep, root),
        blocks=narrow_blocks(m, keep, lambda i, block: dict.fromkeys(norms, root)),
    )
    want = logits(masked(m, keep), tokens())
    np.testing.assert_allclose(logits(cut, tokens()), want, rtol=1e-3, atol=1e-3)


@every_family
def test_transformers_has_the_logits_of_the_narrow_model(
    family: str, tmp_path: pathlib.Path
) -> None:
    # The types' own padding tokens lie beyond so small a vocabulary.
    m, config = model(family), {"pad_token_id": 0, **ALL[family]}
    method = Minitron(hidden=0.5, heads=0.5)
    pruned, outcome = prune(m, method, tokens(), Request(0.8))
    want = logits(pruned, tokens())
    _, form = tiny.written(tmp_path / "out", pruned, config)
    assert form.code is None
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["hidden_size"] == outcome.details["widths"]["channels"] == 8
    again = open_checkpoint(tmp_path / "out")
    np.testing.assert_allclose(logits(again.model, tokens()), want, rtol=1e-4, atol=1e-4)
    pytest.importorskip("torch")
    theirs = torch_models.logits(torch_models.load(tmp_path / "out"), tokens())
    np.testing.assert_allclose(theirs, want, rtol=1e-3, atol=1e-3)
    change = method.shape_change(m)
    assert preview(config, change, "auto").startswith("stock")


@every_family
def test_the_budget_is_met_to_half_a_neuron_in_each_block(family: str) -> None:
    m = model(family)
    for method, sparsity in ((Minitron(), 0.3), (Minitron(hidden=0.75, heads=0.5), 0.65)):
        pruned, outcome = prune(m, method, tokens(), Request(sparsity))
        channels = outcome.details["widths"]["channels"]
        # Of experts eight neurons at a time, for torch's grouped products.
        unit = 3 * channels * (8 * m.arch.config.experts if m.arch.has_experts else 1)
        target = (1 - sparsity) * parameters(m)
        assert abs(parameters(pruned) - target) <= unit / 2 * len(m.blocks)


@pytest.mark.slow
def test_devices_do_not_matter() -> None:
    m = model("llama-gqa")
    method, request = Minitron(hidden=0.5), Request(0.6)
    one, first = prune(m, method, tokens(8), request, Runtime(batch=8))
    mesh = make_mesh("data=4,model=2", 8)
    many, second = prune(m, method, tokens(8), request, Runtime(batch=8, mesh=mesh))
    assert jax.device_count() == 8
    assert first.removed == second.removed
    for a, b in zip(jax.tree.leaves(one.blocks), jax.tree.leaves(many.blocks), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_shares_set_the_size_without_a_sparsity() -> None:
    m = model("llama-gqa")
    method = Minitron(hidden=0.5, heads=0.5, neurons=0.5)
    _, outcome = prune(m, method, tokens(), Request(0.0))
    assert outcome.details["widths"] == {"channels": 8, "heads": [1] * 3, "neurons": [12] * 3}
    assert outcome.asked[0]["q"] == pytest.approx(0.75)
    assert method.sets_sparsity and not Minitron(hidden=0.5).sets_sparsity


def test_heads_go_where_less_than_a_quarter_of_the_neurons_would_stay() -> None:
    m = model("opt")  # half of its parameters are more than its neurons hold
    for sparsity, heads, neurons in ((0.3, 4, 7), (0.35, 3, 12), (0.5, 2, 12)):
        _, outcome = prune(m, Minitron(), tokens(), Request(sparsity))
        assert outcome.details["widths"] == {
            "channels": 16,
            "heads": [heads] * 3,
            "neurons": [neurons] * 3,
        }


def test_whole_shares_change_no_bit() -> None:
    m = model("llama-gqa")
    pruned, outcome = prune(m, Minitron(neurons=1.0), tokens(), Request(0.0))
    assert same(pruned.blocks, m.blocks) and outcome.non_block is None


def test_requests_that_cannot_be_followed_are_refused() -> None:
    m = model("llama")
    for method, sparsity, message in (
        (Minitron(hidden=0.5), 0.3, "less than hidden and heads of minitron remove, 0.5"),
        (Minitron(), 0.95, "more than all neurons of minitron hold"),
        (Minitron(neurons=0.5), 0.3, "sets the size, and so does"),
    ):
        with pytest.raises(InputError, match=message):
            method.check(m, Request(sparsity))
    with pytest.raises(InputError, match="must lie above 0"):
        Minitron(hidden=0.0)
    post = tiny.random_model({**tiny.OPT_350M, "word_embed_proj_dim": 32})
    with pytest.raises(InputError, match="a norm follows each sum"):
        Minitron(hidden=0.5).check(post, Request(0.7))


def test_a_width_that_no_stock_type_holds_is_refused() -> None:
    """OPT's heads make up its hidden size."""
    change = Minitron(hidden=0.5, heads=1.0).shape_change(model("opt"))
    with pytest.raises(InputError, match="no stock type of transformers holds 8 channels"):
        preview(CONFIGS["opt"], change, "auto")
    assert hf.narrower(CONFIGS["opt"], 8)["num_attention_heads"] == 2
