"""Block-wise recovery: zeros stay, held-out error never rises, any devices, any family."""

import collections
import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from calibration.runtime import Runtime
from models.arch import Model, apply_block, embed, logits
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.programs import Program, Recorder, record_programs
from models.sharding import make_mesh
from pruning.recovery import block_steps
from pruning.recovery.blocks import Blocks
from reference import small
from reference.recovery import inputs_of, pruned_by, recover
from reference.sleb import deep

QUICK = Blocks(steps=8, lr=0.01)
HALVES = Blocks(steps=24, lr=0.03, unit="half")


def assert_kept(recovered: Model, pruned: Model) -> None:
    """Zeros at the same entries, other matrices changed, shapes and types as before."""
    for new, old in zip(recovered.blocks, pruned.blocks, strict=True):
        for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            if x.ndim == 2:
                assert np.array_equal(np.asarray(x) == 0, np.asarray(y) == 0)


def outputs(details: Any) -> list[tuple[float, float]]:
    """Held-out error of every block before and after."""
    fits = [record["output"] for record in details["blocks"]]
    return [(fit["held_out"][0], fit["held_out"][fit["best"]]) for fit in fits]


SLOW = pytest.mark.slow
CASES = [
    pytest.param(("llama", "wanda", 0.5, None, {}, QUICK)),
    *(
        pytest.param(case, marks=SLOW)
        for case in (
            ("llama", "wanda", 0.5, (2, 4), {}, dataclasses.replace(QUICK, decay=0.1)),
            ("opt", "sparsegpt", 0.5, None, {}, dataclasses.replace(QUICK, unit="half")),
            ("llama-gqa", "flap", 0.3, None, {}, QUICK),
            ("opt", "flap", 0.3, None, {}, dataclasses.replace(QUICK, inputs="dense")),
            ("llama", "llmrank", 0.3, None, {}, HALVES),
            ("opt", "llmrank", 0.3, None, {"units": "rows"}, QUICK),
            ("llama", "sleb", 0.0, None, {"remove": (0,)}, QUICK),
            ("llama", "sleb", 0.0, None, {"remove": (2,)}, HALVES),
            ("mixtral", "wanda", 0.5, None, {}, QUICK),
            ("gemma2", "wanda", 0.5, None, {}, dataclasses.replace(QUICK, unit="half")),
            ("phi", "wanda", 0.5, None, {}, dataclasses.replace(QUICK, unit="half", loss="cosine")),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_zeros_stay_and_no_block_gets_worse(case: Any) -> None:
    family, method, sparsity, pattern, arguments, recovery = case
    dense = small.model(family)
    pruned, kept = pruned_by(dense, method, sparsity, pattern, **arguments)
    recovered, result = recover(recovery, inputs_of(dense, pruned, kept))
    assert_kept(recovered, pruned)
    errors = outputs(result.details)
    assert all(after <= before for before, after in errors)
    assert any(after < before for before, after in errors)
    assert result.details["zeros"] == sum(
        int((np.asarray(x) == 0).sum())
        for b in pruned.blocks
        for x in jax.tree.leaves(b)
        if x.ndim == 2
    )


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "phi", "gemma2"])
def test_attention_depends_on_its_own_leaves(family: str) -> None:
    """Those before its last linear; norms behind a branch are of the second half."""
    m = small.model(family)
    block: Any = m.blocks[0]
    end = m.arch.group("heads").reader.name
    behind = block_steps.leaves_behind(m.arch.block, end, block, np.zeros((1, 4, 16), np.float32))
    paths, _ = jax.tree.flatten_with_path(block)
    fields = {path[0].name for (path, _), t in zip(paths, behind, strict=True) if t}
    norms = {"qwen3": {"q_norm", "k_norm"}}.get(family, set())
    assert fields == {"q", "k", "v", "o", "attn_norm", *norms}


@pytest.mark.slow
def test_the_block_before_a_cut_meets_the_dense_state_behind_it() -> None:
    dense = deep("llama")
    pruned, kept = pruned_by(dense, "sleb", 0.0, remove=(3, 4), repair="none")
    inputs = inputs_of(dense, pruned, kept)
    recovered, result = recover(Blocks(steps=30, lr=3e-3), inputs)
    x = y = embed(dense.arch, dense.non_block, inputs.windows)
    for block in dense.blocks[:5]:
        x = apply_block(dense.arch, block, x)
    for block in pruned.blocks[:3]:
        y = apply_block(dense.arch, block, y)
    z = embed(dense.arch, dense.non_block, inputs.windows)
    for block in recovered.blocks[:3]:
        z = apply_block(dense.arch, block, z)
    assert np.square(z - x).sum() < 0.8 * np.square(y - x).sum()
    # Before the cut both models are equal: nothing is left to learn.
    assert [record["output"]["held_out"][0] for record in result.details["blocks"][:2]] == [0, 0]
    assert small.same(recovered.blocks[:2], pruned.blocks[:2])


@pytest.mark.slow
def test_blocks_of_one_shape_share_a_compilation() -> None:
    dense = small.model("llama")
    pruned, kept = pruned_by(dense, "wanda", 0.5)
    jax.clear_caches()
    # One for states, one for the logits behind the last block.
    traced = chex.assert_max_traces(block_steps.step.function, n=2)
    step = Program(traced, "recovery step", block_steps.step.static, block_steps.step.donated)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(block_steps, "step", step)
        recover(QUICK, inputs_of(dense, pruned, kept))
        # Other learning rates, decays and numbers of steps are data.
        recover(
            dataclasses.replace(QUICK, steps=6, lr=1e-3, decay=0.1), inputs_of(dense, pruned, kept)
        )


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "batch"), [("data=8", 4), ("data=4,model=2", 4), ("data=2", 3)])
def test_eight_devices_learn_as_one_does(mesh: str, batch: int) -> None:
    dense = small.model("llama")
    pruned, kept = pruned_by(dense, "wanda", 0.5)
    recovery = dataclasses.replace(QUICK, batch=batch, unit="half")
    inputs = inputs_of(dense, pruned, kept, samples=12)
    want = recover(recovery, inputs)[1].details
    runtime = Runtime(mesh=make_mesh(mesh), offload="host")
    model, got = recover(recovery, inputs, runtime)
    assert_kept(model, pruned)
    for a, b in zip(got.details["blocks"], want["blocks"], strict=True):
        for part in ("attention", "output"):
            np.testing.assert_allclose(a[part]["held_out"], b[part]["held_out"], rtol=1e-4)


def test_windows_that_no_update_uses_do_not_go_through_the_models() -> None:
    dense = small.model("llama")
    inputs = inputs_of(dense, *pruned_by(dense, "wanda", 0.5))
    one_step, recorder = Blocks(steps=1, batch=1), Recorder()
    with record_programs(recorder):
        _, result = recover(one_step, inputs)
    embeddings = sum(cost.calls for cost in recorder.costs if cost.name == "embedding")
    held_out = one_step._held_out(len(inputs.windows))
    assert len(inputs.windows) - held_out > 1  # else all are used
    assert embeddings == 2 * (1 + held_out)  # of the dense and of the pruned model
    enough = len(inputs.windows) - held_out
    assert f"steps={enough} would use all" in result.notes[0]
    _, result = recover(dataclasses.replace(one_step, steps=enough), inputs)
    assert not any("windows were used" in note for note in result.notes)


def test_what_cannot_be_recovered_is_refused() -> None:
    dense = small.model("llama")
    with pytest.raises(InputError, match="use distill"):
        QUICK.check(dense, ShapeChange(hidden=8), 16)
    with pytest.raises(InputError, match="give at least 3"):
        QUICK.check(dense, ShapeChange(), 2)
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"hold_out": 1.0}, {"batch": 0}, {"decay": -1.0}):
        with pytest.raises(InputError, match=f"blocks: {next(iter(wrong))}="):
            Blocks(**wrong)  # type: ignore[arg-type]


def test_a_rate_that_is_too_large_is_lowered() -> None:
    """From the best weights on, so that a block that cannot learn at first still learns."""
    dense = small.model("llama")
    recovery = Blocks(steps=24, lr=0.1, batch=1)
    inputs = inputs_of(dense, *pruned_by(dense, "wanda", 0.5), samples=16)
    result = recover(recovery, inputs)[1]
    curves = [(r["output"]["held_out"], r["output"]["best"]) for r in result.details["blocks"]]
    states = curves[:-1]  # the last block is trained on logits, at a third of the rate
    assert all(min(curve[1:3]) > curve[0] for curve, _ in states)
    assert all(best > 2 and curve[best] < 0.98 * curve[0] for curve, best in states)


def test_the_last_block_is_judged_by_the_logits() -> None:
    """By their mean divergence from the dense model's on the held-out windows, in float64."""
    dense = small.model("llama")
    pruned, kept = pruned_by(dense, "magnitude", 0.7)
    inputs = inputs_of(dense, pruned, kept, samples=16)
    recovered, result = recover(Blocks(steps=24, lr=0.03), inputs)
    order = np.random.default_rng(inputs.seed).permutation(len(inputs.windows))
    held_out = inputs.windows[order[-4:]]
    of_dense, of_recovered = (
        scipy.special.log_softmax(np.asarray(logits(m, held_out), np.float64), axis=-1)
        for m in (dense, recovered)
    )
    divergence = (np.exp(of_dense) * (of_dense - of_recovered)).sum(-1).mean()
    fit = result.details["blocks"][-1]["output"]
    assert fit["held_out"][fit["best"]] == pytest.approx(divergence, rel=1e-4)
    assert divergence < 0.95 * fit["held_out"][0]


@pytest.mark.parametrize("length", [128, 130])  # the second needs padding
def test_the_gradient_of_the_divergence_agrees_with_log_probabilities(length: int) -> None:
    """It is made with the value, from logits alone; JAX's own of the definition must agree."""
    dense = small.model("llama")
    states = np.random.default_rng(0).normal(size=(2, 2, length, dense.non_block.embed.shape[1]))
    of_dense, of_pruned = states.astype(np.float32)
    head, non_block = dense.arch.head, dense.non_block

    def definition(x: jax.Array) -> jax.Array:
        p, q = (jax.nn.log_softmax(head(non_block, y), axis=-1) for y in (of_dense, x))
        return jnp.sum(jnp.exp(p) * (p - q))

    def ours(x: jax.Array) -> jax.Array:
        return block_steps.divergence((head, head), (non_block, non_block), of_dense, x)

    expected, gradient = jax.value_and_grad(definition)(of_pruned)
    for value in (ours(of_pruned), jax.value_and_grad(ours)(of_pruned)[0]):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    ours_gradient = jax.grad(lambda x: 3.0 * ours(x))(of_pruned)
    np.testing.assert_allclose(ours_gradient, 3 * gradient, atol=1e-5)


def test_a_block_that_hardly_gains_stays_as_it_was() -> None:
    """What a rate of almost nothing gains is less than what windows of other text would lose."""
    dense = small.model("llama")
    pruned, kept = pruned_by(dense, "wanda", 0.5)
    recovered, result = recover(Blocks(steps=4, lr=1e-5), inputs_of(dense, pruned, kept))
    fits = [record["output"] for record in result.details["blocks"]]
    assert all(fit["best"] == 0 for fit in fits)
    assert all(0.99 * fit["held_out"][0] < min(fit["held_out"]) for fit in fits)
    assert any(min(fit["held_out"]) < fit["held_out"][0] for fit in fits)
    assert small.same(recovered.blocks, pruned.blocks)
    assert "gained too little" in result.notes[0]


@pytest.mark.slow
def test_the_plan_of_a_recovery_is_the_most_that_it_may_do() -> None:
    recovery = Blocks(steps=16, lr=1.0)
    dense = small.model("llama")
    pruned, kept = pruned_by(dense, "wanda", 0.5)
    mesh = make_mesh("data=1")
    inputs = inputs_of(dense, pruned, kept)
    counts = []
    for recorder in (Recorder(), Recorder(mesh)):
        with record_programs(recorder):
            recovery.run(inputs, Runtime(mesh=mesh), lambda j, block: None)
        calls: collections.Counter[str] = collections.Counter()
        for cost in recorder.costs:  # a step behind the last block is a program of its own
            calls[cost.name] += cost.calls
        counts.append(calls)
    run, plan = counts
    assert run.keys() == plan.keys() and all(run[name] <= plan[name] for name in run)
    assert plan["recovery step"] == len(dense.blocks) * recovery.steps


@pytest.mark.slow
def test_the_memory_of_a_recovery_is_that_of_one_block_at_any_depth() -> None:
    peaks = []
    for depth in (2, 8):
        dense = deep("llama", depth)
        mesh = make_mesh("data=1")
        recorder = Recorder(mesh)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dense.blocks)
        model = dense._replace(blocks=shapes)
        with record_programs(recorder):
            QUICK.run(
                inputs_of(model, model, tuple(range(depth))), Runtime(mesh=mesh), lambda j, b: None
            )
        peaks.append(recorder.peak["device"])
    assert peaks[0] == peaks[1]
