"""REAP removes the experts of least saliency, and the router's rows with them."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import embed
from models.errors import InputError
from models.experts import route
from models.surgery import keep_experts
from pruning.structured.reap import Reap
from pruning.types import Request, prune
from reference.small import logits, model, same, tokens

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")


def reference_scores(family: str, i: int) -> dict[str, np.ndarray]:
    """Return the scores of block i's experts by a loop over tokens, in float64."""
    m = model(family)
    x = embed(m.arch, m.non_block, tokens())
    for block in m.blocks[:i]:
        x, _ = m.arch.block(block, x)
    block: Any = m.blocks[i]
    flat = m.arch.block(block, x)[1]["mlp_in"].reshape(-1, x.shape[-1])
    weights, chosen = route(m.arch.config.static.router, block.router, flat)
    n = len(block.experts)
    sums, norms, counts = np.zeros(n), np.zeros(n), np.zeros(n)
    for token, ws, es in zip(np.asarray(flat, np.float64), weights, chosen, strict=True):
        for w, e in zip(np.asarray(ws, np.float64), np.asarray(es), strict=True):
            p = block.experts[e]
            gate, up, down = (np.asarray(q.w, np.float64) for q in (p.gate, p.up, p.down))
            gated = gate @ token
            norm = np.linalg.norm(down @ (gated / (1 + np.exp(-gated)) * (up @ token)))
            sums[e] += w * norm
            norms[e] += norm
            counts[e] += 1
    mean = np.maximum(counts, 1)
    return {"reap": sums / mean, "frequency": counts, "norm": norms / mean}


@pytest.mark.parametrize(
    "score", ["reap", *(pytest.param(s, marks=pytest.mark.slow) for s in ("frequency", "norm"))]
)
@pytest.mark.parametrize(
    "family", [f if f == "olmoe" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_the_experts_of_lowest_score_go(family: str, score: Any) -> None:
    m = model(family)
    pruned, outcome = prune(m, Reap(score), tokens(), Request(0.34), Runtime(batch=4))
    for i, kept in enumerate(outcome.kept_experts):
        if kept is None:  # a block without experts
            assert pruned.blocks[i] is m.blocks[i]
            continue
        want = reference_scores(family, i)[score]
        got = outcome.details["expert_scores"][i]
        np.testing.assert_allclose(got, want, rtol=1e-4)
        # The worst goes of 3 or 4.
        assert set(range(len(want))) - set(kept) == {int(np.argmin(want))}
        before, after = m.blocks[i], pruned.blocks[i]
        assert same(after.experts, tuple(before.experts[e] for e in kept))
        assert np.array_equal(after.router.w, before.router.w[np.array(kept)])


def test_tokens_of_a_removed_expert_go_to_the_next_in_order() -> None:
    """Removing an expert equals a router that can never choose it."""
    m = model("olmoe")
    block: Any = m.blocks[0]
    x = embed(m.arch, m.non_block, tokens())
    y, _ = m.arch.block(keep_experts(block, np.arange(4) != 2), x)
    # With these inputs a row of large negative products stands for an expert that is not there.
    taps = m.arch.block(block, x)[1]
    into = taps["mlp_in"].reshape(-1, x.shape[-1])
    products = np.array(into @ block.router.w.T)
    products[:, 2] = -1e9
    weights, chosen = route(
        m.arch.config.static.router, block.router.replace(w=jnp.eye(4)), jnp.asarray(products)
    )
    assert not (np.asarray(chosen) == 2).any()
    attended = taps["o"] + x
    out = np.array(attended.reshape(-1, x.shape[-1]), np.float64)
    for n, (ws, es) in enumerate(zip(np.asarray(weights), np.asarray(chosen), strict=True)):
        for w, e in zip(ws, es, strict=True):
            p = block.experts[e]
            gated = np.asarray(p.gate.w @ into[n])
            out[n] += w * np.asarray(
                p.down.w @ (gated / (1 + np.exp(-gated)) * np.asarray(p.up.w @ into[n]))
            )
    np.testing.assert_allclose(np.asarray(y).reshape(out.shape), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_zero_changes_no_bit(family: str) -> None:
    m = model(family)
    pruned, _ = prune(m, Reap(), tokens(), Request(0.0))
    assert same(pruned.blocks, m.blocks)


def test_the_result_runs_and_is_the_same_again() -> None:
    m = model("qwen3_moe")
    first, outcome = prune(m, Reap(), tokens(), Request(0.5))
    again, _ = prune(m, Reap(), tokens(), Request(0.5))
    assert same(first.blocks, again.blocks) and np.isfinite(logits(first, tokens())).all()
    assert not np.allclose(logits(first, tokens()), logits(m, tokens()), rtol=1e-2, atol=1e-2)
    assert json.loads(json.dumps(outcome.details)) == outcome.details


def test_requests_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(InputError, match="this model has none"):
        Reap().check(model("llama"), Request(0.5))
    with pytest.raises(InputError, match="fewer experts than a token takes, 2 of 4") as e:
        Reap().check(model("olmoe"), Request(0.75))
    assert "at most 0.5" in str(e.value)
    with pytest.raises(InputError, match="pattern"):
        Reap().check(model("olmoe"), Request(0.5, pattern=(2, 4)))


@pytest.mark.slow
def test_devices_do_not_matter() -> None:
    from models.sharding import make_mesh

    m = model("mixtral")
    _, one = prune(m, Reap(), tokens(8), Request(0.34), Runtime(batch=8))
    mesh = make_mesh("data=4,model=2", 8)
    _, many = prune(m, Reap(), tokens(8), Request(0.34), Runtime(batch=8, mesh=mesh))
    assert one.kept_experts == many.kept_experts
    for a, b in zip(one.details["expert_scores"], many.details["expert_scores"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert jax.device_count() == 8
