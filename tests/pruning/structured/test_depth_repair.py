"""Repairs of depth pruning against float64 ports, and what must hold of them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Model, logits
from models.errors import InputError
from models.layers import Linear
from models.sharding import make_mesh
from pruning.structured import depth_repair_core as core
from pruning.structured.sleb import Sleb
from pruning.types import Outcome, Request, prune
from reference import depth, small, tiny
from reference.sleb import LENGTH, TOKENS, WINDOWS, deep, loss

# Where the last linear before a cut can be fitted: no norm follows it, and all tokens meet it.
ADDING = [
    f
    for f in small.EVERY_FAMILY
    if small.model(f).arch.outputs_add and not any(s.part_of for s in small.model(f).arch.slots)
]
REMOVED = (2, 5, 3)


def run(m: Model, remove: Any, repair: str, batch: int = 2) -> tuple[Model, Outcome]:
    method = Sleb(remove=remove, repair=repair)  # type: ignore[arg-type]
    return prune(m, method, TOKENS, Request(0.0), Runtime(batch=batch))


def assert_close(got: Any, want: Any, tolerance: float = 2e-4) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_the_fit_is_weighted_least_squares(bias: bool) -> None:
    rng = np.random.default_rng(0)
    h, y, target = (rng.normal(0.3, 1, (3, 20, n)).astype(np.float32) for n in (12, 5, 5))
    b = jnp.asarray(rng.normal(size=5), jnp.float32) if bias else None
    p = Linear(jnp.asarray(rng.normal(size=(5, 12)), jnp.float32), b)
    stats = core.begin_cut_stats(12, 5)
    for window in range(3):
        stats = core.add_cut_stats(stats, *(a[window : window + 1] for a in (h, y, target)))
    new, errors = core.refit_before_cut(p, stats, np.float32(0.5))
    flat = [a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (h, y, target)]
    assert_close(new, depth.refit(p, *flat, branch_scale=0.5), 1e-5)
    change = new.w - p.w
    after = flat[1] + 0.5 * flat[0] @ np.asarray(change, np.float64).T
    if bias:
        after += 0.5 * np.asarray(new.b - p.b)
    want = [depth.relative_error(a, flat[2]) for a in (flat[1], after)]
    np.testing.assert_allclose(errors, want, rtol=1e-5)
    assert want[1] < want[0]


@pytest.mark.parametrize("kind", ["refit", "scale", "scale+refit"])
@pytest.mark.parametrize("removed", [REMOVED, (1, 6, 7)])
def test_repairs_agree_with_float64_ports(kind: str, removed: tuple[int, ...]) -> None:
    m = deep("llama")
    pruned, outcome = run(m, removed, kind)
    blocks, out, cuts = depth.repair(m, removed, TOKENS, kind)
    np.testing.assert_allclose(small.logits(pruned, TOKENS), out, rtol=2e-4, atol=2e-4)
    if kind == "refit":
        assert_close(pruned.blocks, blocks)
    got = outcome.details["cuts"]
    assert outcome.details["repair"] == kind and len(got) == len(cuts)
    for a, b in zip(got, [c for c in cuts], strict=True):
        assert a.keys() == b.keys() and (a["behind"], a.get("linear")) == (
            b["behind"],
            b.get("linear"),
        )
        for name in {"factor", "error"} & set(b):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3)


@pytest.mark.parametrize(
    "family", [ADDING[0], *(pytest.param(f, marks=pytest.mark.slow) for f in ADDING[1:])]
)
def test_the_refit_agrees_in_every_family_whose_outputs_add(family: str) -> None:
    m = small.model(family)
    tokens = small.tokens()
    method = Sleb(remove=[1], repair="refit")
    pruned, outcome = prune(m, method, tokens, Request(0.0), Runtime(batch=4))
    blocks, _, cuts = depth.repair(m, {1}, tokens, "refit")
    assert_close(pruned.blocks, blocks, 1e-3)
    np.testing.assert_allclose(outcome.details["cuts"][0]["error"], cuts[0]["error"], rtol=1e-3)


@pytest.mark.parametrize(
    "family",
    ["gemma2"]
    + [pytest.param(f, marks=pytest.mark.slow) for f in small.EVERY_FAMILY if f != "gemma2"],
)
def test_the_scale_is_folded_in_every_family(family: str) -> None:
    """The file computes what multiplying the stream at the cuts computes, untied from nothing."""
    m, tokens = small.model(family), small.tokens()
    pruned, _ = prune(m, Sleb(remove=[1], repair="scale"), tokens, Request(0.0), Runtime(batch=4))
    _, out, cuts = depth.repair(m, {1}, tokens, "scale")
    assert abs(math.log(cuts[0]["factor"])) > 0.01
    np.testing.assert_allclose(small.logits(pruned, tokens), out, rtol=2e-3, atol=2e-3)
    assert small.same(pruned.blocks[0], m.blocks[0]) and small.same(pruned.non_block, m.non_block)


def test_the_scale_is_the_fold_of_prune_and_comp() -> None:
    """Multiplying the embedding and the branches before a cut, behind an untied head."""
    m, tokens = small.model("llama-gqa"), small.tokens()
    pruned, outcome = prune(m, Sleb(remove=[1], repair="scale"), tokens, Request(0.0))
    factor = np.float32(outcome.details["cuts"][0]["factor"])
    first = m.blocks[0]
    first = first.replace(o=Linear(first.o.w * factor), down=Linear(first.down.w * factor))
    non_block = m.non_block.replace(
        head=Linear(m.non_block.embed), embed=m.non_block.embed * factor
    )
    theirs = Model(m.arch, non_block, (first, m.blocks[2]))
    np.testing.assert_allclose(
        small.logits(pruned, tokens), small.logits(theirs, tokens), rtol=1e-3, atol=1e-4
    )


def test_repairs_lower_the_loss() -> None:
    m = deep("llama")
    losses = {kind: loss(m, run(m, REMOVED, kind)[0].blocks) for kind in ("none", "refit")}
    assert losses["refit"] < losses["none"]


def test_where_nothing_is_missing_nothing_changes() -> None:
    """Blocks that do nothing leave the stream as it is."""
    m = deep("llama")
    idle = m.blocks[3].replace(
        o=jax.tree.map(jnp.zeros_like, m.blocks[3].o),
        down=jax.tree.map(jnp.zeros_like, m.blocks[3].down),
    )
    m = m._replace(blocks=(*m.blocks[:3], idle, *m.blocks[4:]))
    pruned, outcome = run(m, [3], "scale+refit")
    assert_close(pruned.blocks, (*m.blocks[:3], *m.blocks[4:]), 1e-6)
    assert outcome.details["cuts"][0]["factor"] == pytest.approx(1, abs=1e-6)


def test_a_silenced_part_is_made_up_for_by_the_last_linear_of_its_block() -> None:
    """Without attention the feed-forward part is fitted, without it the attention's output."""
    m = deep("llama", 4)
    method = Sleb(remove=[2, 5], units="sublayers", repair="refit")
    pruned, outcome = prune(m, method, TOKENS, Request(0.0), Runtime(batch=6))
    assert [(c["behind"], c["linear"]) for c in outcome.details["cuts"]] == [
        (1, "down"),
        (2, "o"),
    ]
    assert all(c["error"][1] < c["error"][0] for c in outcome.details["cuts"])
    assert not np.asarray(pruned.blocks[1].o.w).any()
    assert not np.asarray(pruned.blocks[2].down.w).any()
    plain, _ = prune(m, Sleb(remove=[2, 5], units="sublayers", repair="none"), TOKENS, Request(0.0))
    assert loss(m, pruned.blocks) < loss(m, plain.blocks)
    for new, old, fitted in ((pruned, plain, {1: "down", 2: "o"}),):
        for i, (a, b) in enumerate(zip(new.blocks, old.blocks, strict=True)):
            keep = {fitted[i]: getattr(b, fitted[i])} if i in fitted else {}
            assert small.same(a.replace(**keep), b)


@pytest.mark.slow
def test_the_micro_batch_changes_no_fit() -> None:
    a, b = (run(deep("opt"), REMOVED, "scale+refit", batch)[0].blocks for batch in (4, 6))
    assert_close(a, b, 1e-4)


@pytest.mark.slow
def test_a_mesh_repairs_the_same() -> None:
    m, method = deep("llama"), Sleb(remove=REMOVED, repair="scale+refit")
    one, many = (
        prune(m, method, TOKENS, Request(0.0), Runtime(batch=4, mesh=mesh))[0].blocks
        for mesh in (None, make_mesh("data=4,model=2"))
    )
    assert_close(one, many, 1e-4)


@pytest.mark.parametrize(
    ("config", "repair", "message"),
    [
        (
            "gemma2",
            "refit",
            "repair=refit of sleb fits the last linear before a cut, and here a norm follows it: "
            'give repair="scale"',
        ),
        (
            tiny.OPT_350M | {"vocab_size": small.VOCAB},
            "scale",
            "repair=scale of sleb needs a final norm and blocks that only add to the residual "
            'stream: give repair="none"',
        ),
    ],
)
def test_a_repair_without_an_exact_form_is_refused(config: Any, repair: str, message: str) -> None:
    m = small.model(config) if isinstance(config, str) else tiny.random_model(config)
    with pytest.raises(InputError) as error:
        run(m, [1], repair)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("family", "variant", "repair"),
    [
        ("llama", "corrected", "refit"),
        ("gemma2", "corrected", "scale"),
        ("llama", "official", "none"),
    ],
)
def test_the_default_repair_follows_the_variant_and_the_architecture(
    family: str, variant: Any, repair: str
) -> None:
    m, tokens = small.model(family), small.tokens()
    pruned, outcome = prune(m, Sleb(remove=[1], variant=variant), tokens, Request(0.0))
    assert outcome.details["repair"] == repair
    assert small.same(pruned.blocks, (m.blocks[0], m.blocks[2])) == (repair == "none")


def test_a_cut_at_the_start_has_no_linear_before_it() -> None:
    m = deep("llama")
    pruned, outcome = run(m, [0, 1], "refit")
    assert outcome.details["cuts"] == []
    assert small.same(pruned.blocks, m.blocks[2:])


def test_an_overflow_is_bad_input() -> None:
    m = deep("llama")
    huge = jax.tree.map(lambda x: x * 1e38, m.blocks[3])
    with pytest.raises(InputError, match="activations of block 2 are not finite"):
        run(m._replace(blocks=(*m.blocks[:3], huge, *m.blocks[4:])), [3], "refit")


def test_the_last_states_are_those_of_the_pruned_model() -> None:
    """The figures of a cut behind the last block are those of the written model."""
    m = deep("llama")
    pruned, outcome = run(m, [6, 7], "refit")
    x, y = (
        np.asarray(_last(model), np.float64).reshape(WINDOWS * LENGTH, -1) for model in (m, pruned)
    )
    want = depth.relative_error(y, x)
    assert outcome.details["cuts"][-1]["error"][1] == pytest.approx(want, rel=1e-4)
    assert np.isfinite(logits(pruned, TOKENS)).all()


def _last(m: Model) -> jax.Array:
    x = m.arch.embed(m.non_block, TOKENS)
    for block in m.blocks:
        x, _ = m.arch.block(block, x)
    return x
