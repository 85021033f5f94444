"""SparseLLM: its steps against their formulas, and the corrected variant's promises."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.runtime import Runtime
from launch.flags.calls import build
from models.arch import Model, embed
from models.checkpoint.blocks import ShapeBlocks
from models.checkpoint.reader import abstract
from models.errors import InputError
from models.families import hf
from models.layers import ACTIVATIONS, Linear, linear
from models.programs import Recorder, record_programs
from models.sharding import make_mesh
from pruning.methods import METHODS
from pruning.types import Allocation, Outcome, Request, prune
from pruning.weights import sparsegpt_core, sparsellm_block
from pruning.weights import sparsellm_core as core
from pruning.weights import sparsellm_corrected_core as corrected_core
from pruning.weights import sparsellm_solvers_core as solvers
from reference.small import CONFIGS, FAMILIES, model, run_block, same, tokens, zeros

PENALTIES = core.Penalties(0.3, 2.0, 0.7)
ITERATIONS = 3  # the same everywhere, so that few runs compile anew
TWO = ("llama-gqa", "opt")
every_family = pytest.mark.parametrize("family", FAMILIES)
both_variants = pytest.mark.parametrize(
    "variant", ["corrected", pytest.param("official", marks=pytest.mark.slow)]
)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Random numbers, float32."""
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


@functools.cache
def run(family: str, **arguments: Any) -> tuple[Model, Outcome]:
    """The small model pruned by half on one micro-batch of eight windows."""
    return prune(model(family), METHODS["sparsellm"](**arguments), tokens(8), Request(0.5))


def part(m: Model, block: int = 0) -> core.Ffn:
    """A block's feed-forward part."""
    return sparsellm_block.ffn_of(m.arch, m.blocks[block])


def differing(a: Model, b: Model) -> float:
    """The share of weights that only one of the models has removed."""
    pairs = [(x[slot], y[slot]) for x, y in zip(zeros(a), zeros(b), strict=True) for slot in x]
    return sum(int(np.sum(x != y)) for x, y in pairs) / sum(x.size for x, _ in pairs)


@pytest.mark.parametrize(("out", "neurons"), [(16, 24), (24, 16)])
@pytest.mark.parametrize("biased", [True, False])
def test_p_solves_equation_8(out: int, neurons: int, biased: bool) -> None:
    """The paper's system of f x f, solved in float64."""
    w, b = normal(out, neurons), normal(out, seed=1) if biased else None
    y, h, c = normal(5, 7, out, seed=2), normal(5, 7, neurons, seed=3), PENALTIES
    two = Linear(jnp.asarray(w), None if b is None else jnp.asarray(b))
    got = core.p_step(two, core.p_gain(two, c), jnp.asarray(y), jnp.asarray(h))
    w64 = w.astype(np.float64)
    lacks = y - (0 if b is None else b).astype(np.float64) if biased else y.astype(np.float64)
    right = c.beta * lacks @ w64 + c.gamma * h
    want = np.linalg.solve(
        c.beta * w64.T @ w64 + c.gamma * np.eye(neurons), right.reshape(-1, neurons).T
    ).T
    np.testing.assert_allclose(got, want.reshape(h.shape), rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    "c", [PENALTIES, core.Penalties(2.0, 1.0, 0.1), core.Penalties(0.1, 0.1, 0.1)]
)
def test_z_of_relu_is_the_minimum_over_a_grid(c: core.Penalties) -> None:
    """Of gamma (p - relu(z))^2 + alpha (z - m)^2, everywhere."""
    m, p = normal(200, scale=2), normal(200, seed=1, scale=2)

    def cost(z: np.ndarray) -> np.ndarray:
        return c.gamma * (p - np.maximum(z, 0)) ** 2 + c.alpha * (z - m) ** 2

    got = np.asarray(core.relu_minimum(jnp.asarray(m), jnp.asarray(p), c)).astype(np.float64)
    least = np.min(cost(np.linspace(-10, 10, 20001)[:, None]), axis=0)
    assert np.all(cost(got) <= least + 1e-5)
    assert np.all(cost(got) >= least - 1e-5)
    assert np.any(got > 0) and np.any(got < 0)


def test_z_behind_a_gate_has_no_slope() -> None:
    m, p, g, c = normal(500), normal(500, seed=1), normal(500, seed=2, scale=5), PENALTIES
    z = np.asarray(core.z_gated(*(jnp.asarray(x) for x in (m, p, g)), c)).astype(np.float64)
    slope = c.alpha * (z - m) - c.gamma * g * (p - g * z)
    np.testing.assert_allclose(
        slope / (c.alpha + c.gamma * g.astype(np.float64) ** 2), 0, atol=1e-5
    )


def test_a_fit_has_no_slope() -> None:
    """Of |R - D X|^2 + ridge mean(H_ii) |D|^2, D what the fit adds to W: in float64."""
    w, x, r, ridge = normal(5, 8), normal(20, 8, seed=1), normal(20, 5, seed=2), 0.3
    h = x.T @ x
    got = solvers.ridge_step(
        jnp.asarray(w), jnp.asarray(r.T @ x), sparsegpt_core.factor(jnp.asarray(h), ridge)
    )
    added, x64 = np.asarray(got, np.float64) - w, x.astype(np.float64)
    slope = ridge * np.mean(np.diag(h)) * added - (r - x64 @ added.T).T @ x64
    np.testing.assert_allclose(slope, 0, atol=1e-4 * np.abs(r.T @ x).max())
    assert np.abs(added).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("family", TWO)
def test_a_ridge_is_for_other_tokens(family: str) -> None:
    """SparseGPT's little damping fits few tokens better, other tokens worse.

    A very large ridge leaves W1 and its gate alone.
    """
    m = model(family)
    ffn, act = part(m), m.arch.config.act
    settings = METHODS["sparsellm"]()._settings(m.arch, Request(0.5))
    *writers, two = (
        settings.pattern.counts(p.w.shape, np.asarray(0.5)) for p in (*ffn.writers, ffn.w2)
    )
    few, other = (jnp.asarray(normal(1, n, 16, 16, seed=n)) for n in (4, 64))
    y, unseen = (linear(ffn.w2, core.hidden_input(ffn, x, act)) for x in (few, other))

    def solved(ridge: float, iterations: int = ITERATIONS) -> core.Solution:
        method = METHODS["sparsellm"](iterations=iterations, ridge=ridge)
        c = method._settings(m.arch, Request(0.5))
        return corrected_core.solve_corrected(ffn, [few], [y], core.Counts(tuple(writers), two), c)

    loose, held = solved(0.01), solved(1.0)
    assert min(loose.losses[1:]) < loose.losses[0] and min(held.losses[1:]) < held.losses[0]
    assert core.squared_error(held.ffn, other, unseen, act) < 0.9 * core.squared_error(
        loose.ffn, other, unseen, act
    )
    start, fixed = solved(1.0, 1), solved(1e9)
    for a, b in zip(start.ffn.writers, fixed.ffn.writers, strict=True):
        np.testing.assert_allclose(a.w, b.w, rtol=0, atol=1e-5)


@every_family
def test_the_error_of_a_round_is_that_of_a_forward(family: str) -> None:
    """And the residuals of z and s have the writers' shapes."""
    m = model(family)
    ffn, x, y = part(m), jnp.asarray(normal(6, 12, 16)), jnp.asarray(normal(6, 12, 16, seed=1))
    residuals, error = core.residuals_and_error(
        ffn, core.p_gain(ffn.w2, PENALTIES), x, y, m.arch.config.act, PENALTIES
    )
    assert [r.shape for r in residuals] == [(6, 12, 24)] * len(ffn.writers)
    assert float(error) == pytest.approx(
        float(core.squared_error(ffn, x, y, m.arch.config.act)), rel=1e-6
    )
    act = ACTIVATIONS[m.arch.config.act]
    outs = [x @ p.w.T + (0 if p.b is None else p.b[None, None]) for p in ffn.writers]
    hidden = act(outs[0]) if len(outs) == 1 else act(outs[1]) * outs[0]
    out = np.asarray(hidden @ ffn.w2.w.T + (0 if ffn.w2.b is None else ffn.w2.b[None, None]))
    assert float(error) == pytest.approx(
        float(np.sum((out - np.asarray(y)).astype(np.float64) ** 2)), rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", TWO)
def test_the_iteration_of_least_error_is_kept(family: str) -> None:
    """Block 0's feed-forward part has the least of the reported errors when it runs again."""
    m, (pruned, outcome) = model(family), run(family, iterations=ITERATIONS)
    losses, kept = outcome.details["loss"], outcome.details["iteration_kept"]
    assert [len(x) for x in losses] == [ITERATIONS] * 3
    assert kept == [int(np.argmin(x)) for x in losses]
    attention = {
        s.name: getattr(pruned.blocks[0], s.name)
        for s in m.arch.slots
        if s.name not in sparsellm_block.ffn_names(m.arch).slots
    }
    behind = m.blocks[0].replace(**attention)
    h = embed(m.arch, m.non_block, tokens(8))
    x, y = sparsellm_block.ffn_inputs_and_targets(m.arch, None, m.blocks[0], behind, h)
    again = float(core.squared_error(part(pruned), x, y, m.arch.config.act)) / y.size
    assert again == pytest.approx(min(losses[0]), rel=1e-4)
    # The same in terms of the blocks' outputs: the pruned block's error is what its feed-forward
    # part leaves of y.
    wrong = np.asarray(run_block(m, pruned.blocks[0], h)[0]) - np.asarray(
        run_block(m, m.blocks[0], h)[0]
    )
    assert float(np.mean(wrong.astype(np.float64) ** 2)) == pytest.approx(min(losses[0]), rel=1e-4)


def test_a_large_stream_leaves_a_target_its_digits() -> None:
    """With a channel of thousands in bfloat16, the target is as exact as outputs of linears."""
    x = normal(2, 12, 16)
    x[..., 3] = 3000.0  # where bfloat16 has steps of 16

    def target(m: Model, dtype: Any) -> jax.Array:
        dense = jax.tree.map(lambda p: p.astype(dtype), m.blocks[0])
        pruned = dense.replace(o=dense.o.replace(w=dense.o.w * 0.5))
        return sparsellm_block.ffn_inputs_and_targets(
            m.arch, None, dense, pruned, jnp.asarray(x, jnp.bfloat16).astype(dtype)
        )[1]

    m = model("llama-gqa", dtype="bfloat16")
    got, want = target(m, jnp.bfloat16), target(m, jnp.float32)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), want, rtol=0, atol=0.02 * float(jnp.abs(want).max())
    )


@pytest.mark.slow
def test_more_iterations_never_end_worse() -> None:
    """The first is SparseGPT, however many follow."""
    one, more = (run("opt", iterations=n)[1].details["loss"][0] for n in (1, ITERATIONS))
    assert more[0] == pytest.approx(one[0], rel=1e-3)
    assert min(more) <= one[0] * (1 + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("family", TWO)
def test_the_micro_batch_does_not_matter(family: str, batch: int) -> None:
    """Sums over tokens in another order; weights of block 0 only, as blocks amplify differences."""
    many, _ = prune(
        model(family),
        METHODS["sparsellm"](iterations=ITERATIONS),
        tokens(8),
        Request(0.5),
        Runtime(batch=batch),
    )
    one, _ = run(family, iterations=ITERATIONS)
    assert differing(one, many) <= 1e-3
    for a, b in zip(jax.tree.leaves(one.blocks[0]), jax.tree.leaves(many.blocks[0]), strict=True):
        agreed = (np.asarray(a) == 0) == (np.asarray(b) == 0)
        np.testing.assert_allclose(
            np.asarray(a)[agreed], np.asarray(b)[agreed], rtol=0, atol=1e-4 * np.abs(b).max()
        )


@pytest.mark.slow
@both_variants
def test_a_mesh_leaves_the_same_masks(variant: str) -> None:
    """Eight devices, windows and matrices split."""
    m, one = model("opt"), run("opt", variant=variant, iterations=ITERATIONS)[0]
    method = METHODS["sparsellm"](variant=variant, iterations=ITERATIONS)
    many, _ = prune(m, method, tokens(8), Request(0.5), Runtime(mesh=make_mesh("data=8")))
    assert len(many.blocks[0].q.w.sharding.device_set) == 8
    assert differing(one, many) <= 5e-3


@both_variants
def test_first_half_leaves_the_rest_alone(variant: str) -> None:
    """Of three blocks, one is pruned."""
    m, (pruned, outcome) = (
        model("opt"),
        run("opt", variant=variant, iterations=ITERATIONS, first_half=True),
    )
    assert not same(pruned.blocks[0], m.blocks[0])
    assert same(tuple(pruned.blocks[1:]), tuple(m.blocks[1:]))
    assert outcome.asked == (dict.fromkeys((s.name for s in m.arch.slots), 0.5), {}, {})
    assert [len(x) for x in outcome.details["loss"]] == [ITERATIONS, 0, 0]
    assert outcome.details["iteration_kept"][1:] == [None, None]
    assert [bool(x) for x in outcome.details["damping"]] == [True, False, False]


@both_variants
@pytest.mark.parametrize(
    ("family", "pattern"),
    [("llama-gqa", (2, 4)), pytest.param("opt", (4, 8), marks=pytest.mark.slow)],
)
def test_groups_lose_exactly_n(family: str, pattern: tuple[int, int], variant: str) -> None:
    """In every linear of every block."""
    n, m = pattern
    method = METHODS["sparsellm"](variant=variant, iterations=ITERATIONS)
    pruned, _ = prune(model(family), method, tokens(8), Request(0.5, pattern))
    for block in zeros(pruned):
        for slot, gone in block.items():
            assert np.all(gone.reshape(len(gone), -1, m).sum(axis=2) == n), slot


@pytest.mark.parametrize("family", TWO)
def test_biases_and_norms_stay(family: str) -> None:
    m, (pruned, _) = model(family), run(family, iterations=ITERATIONS)
    for old, new in zip(m.blocks, pruned.blocks, strict=True):
        without = {s.name: None for s in m.arch.slots}
        assert same(old.replace(**without), new.replace(**without))
        assert all(same(getattr(old, s.name).b, getattr(new, s.name).b) for s in m.arch.slots)


@pytest.mark.slow
@both_variants
def test_activations_may_be_more_than_an_int32_counts(variant: str) -> None:
    """LLaMA-2-70B's of 128 windows of 2048 are more; the run is followed on shapes alone."""
    m, samples = model("llama"), 1 << 16
    windows = np.broadcast_to(np.zeros((), np.int32), (samples, 1 << 11))
    recorder = Recorder(make_mesh(""))
    with record_programs(recorder):
        METHODS["sparsellm"](variant=variant).run(
            m, windows, Request(0.5), Runtime(batch=samples), lambda i, block: None
        )
    assert "alternation" in {cost.name for cost in recorder.costs}


@pytest.mark.slow
def test_weights_keep_their_type() -> None:
    m = model("llama", dtype="bfloat16")
    pruned, _ = prune(m, METHODS["sparsellm"](iterations=2), tokens(), Request(0.5))
    assert {str(x.dtype) for x in jax.tree.leaves(tuple(pruned.blocks))} == {"bfloat16"}


def test_nothing_asked_changes_nothing() -> None:
    m = model("opt")
    pruned, outcome = prune(m, METHODS["sparsellm"](), tokens(), Request(0.0))
    assert same(tuple(pruned.blocks), tuple(m.blocks))
    assert outcome.details["loss"] == [[], [], []]


@pytest.mark.parametrize(
    ("family", "field", "act", "gate"),
    [("opt", "activation_function", "gelu", "without"), ("llama", "hidden_act", "relu", "with")],
)
def test_an_activation_that_the_authors_lack_is_bad_input_for_the_official_variant(
    family: str, field: str, act: str, gate: str
) -> None:
    m = model(family)
    arch, *_ = hf.specs(CONFIGS[family] | {field: act})
    with pytest.raises(InputError, match=f"no step for {act} {gate} a gate: use variant="):
        prune(
            m._replace(arch=arch),
            METHODS["sparsellm"](variant="official"),
            tokens(),
            Request(0.5),
        )


@pytest.mark.parametrize("value", [0, -1.0])
@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "iterations"])
def test_penalties_and_iterations_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(InputError, match="must be"):
        METHODS["sparsellm"](**{name: value})


def test_negative_damping_is_bad_input() -> None:
    with pytest.raises(InputError, match="damp not negative"):
        METHODS["sparsellm"](damp=-0.01)
    with pytest.raises(InputError, match="ridge must not be negative"):
        METHODS["sparsellm"](ridge=-0.01)


def test_a_ridge_is_bad_input_for_the_official_variant() -> None:
    with pytest.raises(InputError, match="belongs to the corrected variant"):
        METHODS["sparsellm"](ridge=1.0, variant="official")


def test_an_iteration_that_helps_nowhere_is_a_warning() -> None:
    """Only blocks that were iterated more than once; the official variant keeps its last."""
    m = model("opt")
    budget = Allocation(tuple({"fc1": np.float64(0.5)} for _ in m.blocks))
    losses = [[1.0, 2.0, 1.5], [2.0, 1.0, 1.5], [1.0]]
    records = [({}, block_losses) for block_losses in losses]
    outcome = METHODS["sparsellm"]()._outcome(budget, 3, records)
    assert outcome.warnings == (
        "block 0: no iteration was better than SparseGPT's solution, which stays",
    )
    assert outcome.details["iteration_kept"] == [0, 1, 0]
    official = METHODS["sparsellm"](variant="official")._outcome(budget, 3, records)
    assert official.warnings == () and official.details["iteration_kept"] == [2, 2, 0]


def test_a_raise_of_the_damping_is_a_warning() -> None:
    """Three tokens cannot span sixteen inputs; undamped, H of every input is singular."""
    _, outcome = prune(
        model("llama"), METHODS["sparsellm"](damp=0.0, iterations=1), tokens(1, 3), Request(0.5)
    )
    assert any("feed-forward: damping raised from 0 to" in w for w in outcome.warnings), (
        outcome.warnings
    )


def test_it_is_built_from_a_users_words() -> None:
    """And a variant that there is not is bad input."""
    method = build(
        "method", 'sparsellm(variant="official", iterations=3, first_half=True)', METHODS
    )
    pruned, outcome = prune(model("opt"), method, tokens(8), Request(0.5))
    want, _ = run("opt", variant="official", iterations=ITERATIONS, first_half=True)
    assert same(tuple(pruned.blocks), tuple(want.blocks))
    assert [len(x) for x in outcome.details["loss"]] == [ITERATIONS, 0, 0]
    with pytest.raises(InputError, match="wrong variant: give one of 'corrected', 'official'"):
        build("method", 'sparsellm(variant="best")', METHODS)


@pytest.mark.slow
def test_tokens_and_sums_are_spread_over_the_devices() -> None:
    """70B's fit no chip otherwise: two Gram matrices of the neurons, and all tokens twice."""
    config = CONFIGS["llama"] | {"hidden_size": 64, "intermediate_size": 512}
    arch, non_block, specs = hf.specs(config | {"num_hidden_layers": 1})
    shapes = abstract(arch, non_block, specs, jnp.float32)
    shaped = Model(arch, shapes.non_block, ShapeBlocks(specs, jnp.float32))
    windows, peaks = tokens(64, 32), {}
    for spec in ("data=1", "data=2,model=4"):
        mesh = make_mesh(spec, 4)
        recorder = Recorder(mesh)
        with record_programs(recorder):
            prune(shaped, METHODS["sparsellm"](), windows, Request(0.5), Runtime(4, mesh=mesh))
        (alternation,) = (cost for cost in recorder.costs if cost.name == "alternation")
        peaks[spec] = alternation.memory
    assert peaks["data=2,model=4"] < 0.6 * peaks["data=1"]
