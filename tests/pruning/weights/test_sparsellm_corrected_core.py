"""SparseLLM's corrected alternation against a float64 port, and on models of every activation."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.arch import Model, embed
from models.families import hf
from models.layers import Linear
from models.precision import matmul_type
from pruning.methods import METHODS
from pruning.types import Outcome, Request, prune
from pruning.weights import admm, patterns, sparsegpt_core, sparsellm_corrected_core
from pruning.weights import sparsellm_core as core
from pruning.weights import sparsellm_solvers_core as solvers
from reference import prune_runs, tiny
from reference import sparsellm as reference
from reference.small import CONFIGS, model, run_block, tokens

ACTIVATION = {"opt": "activation_function", "llama": "hidden_act", "llama-gqa": "hidden_act"}
WIDTH, NEURONS, TOKENS = 16, 24, 240
PENALTIES = core.Penalties(0.01, 10.0, 1.0)
ITERATIONS, FRACTION, DAMP, RIDGE = 3, 0.5, 0.01, 1.0


def random_part(gated: bool) -> core.Ffn:
    """A random part with biases, float32."""
    rng = np.random.default_rng(0)

    def linear(out: int, into: int) -> Linear:
        w, b = rng.normal(0, into**-0.5, (out, into)), rng.normal(0, 0.1, out)
        return Linear(*(jnp.asarray(x, jnp.float32) for x in (w, b)))

    writers = [linear(NEURONS, WIDTH) for _ in range(1 + gated)]
    return core.Ffn(writers[0], writers[1] if gated else None, linear(WIDTH, NEURONS))


def in_float64(p: Linear | None) -> Any:
    """The linear as the port takes it."""
    return p and reference.Linear(*(np.asarray(x, np.float64) for x in (p.w, p.b)))


@functools.cache
def both(
    act: str, gated: bool, solver: str = "sparsegpt"
) -> tuple[core.Ffn, core.Solution, list[Any], list[float]]:
    """The dense part, our solution, and the port's parts and losses."""
    dense, rng = random_part(gated), np.random.default_rng(1)
    # Inputs that depend on each other, or SparseGPT would have nothing to make up for.
    x = rng.normal(0, 1, (TOKENS, WIDTH)) @ rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH))
    x = (1.5 * x).astype(np.float32)
    port = reference.Ffn(*(in_float64(p) for p in dense))
    damp = admm.DAMP if solver == "admm" else DAMP
    c = reference.Settings(act, FRACTION, *PENALTIES, damp, RIDGE, ITERATIONS, solver)
    x64 = x.astype(np.float64)
    y = port.w2(reference._hidden(c, port, x64))
    parts, losses = reference.solve(port, x64, y, c)
    pattern, rule = patterns.per_column_block(sparsegpt_core.COLUMNS), None
    if solver == "admm":
        pattern = patterns.per_row
        rule = solvers.by_admm(damp, admm.rounds(pattern))
    rule = rule or solvers.by_sparsegpt(damp, RIDGE, pattern)
    *writers, w2 = (pattern.counts(p.w.shape, np.asarray(FRACTION)) for p in _linears(dense))
    settings = core.Settings(act, pattern, damp, rule, PENALTIES, ITERATIONS)
    stacked = (jnp.asarray(a, jnp.float32).reshape(4, 3, -1, WIDTH) for a in (x, y))
    ours = jax.jit(sparsellm_corrected_core.solve_corrected, static_argnums=4)(
        dense, *((a,) for a in stacked), core.Counts(tuple(writers), w2), settings
    )
    return dense, ours, parts, losses


def _linears(part: Any) -> list[Any]:
    """The part's linears, W1 first and W2 last."""
    return [p for p in part if p is not None]


@pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "act",
    ["gelu", *(pytest.param(a, marks=pytest.mark.slow) for a in ("gelu_new", "silu", "relu"))],
)
@pytest.mark.parametrize("solver", ["sparsegpt", "admm"])
def test_the_alternation_is_that_of_a_float64_port(act: str, gated: bool, solver: str) -> None:
    """Errors of every iteration to 1e-3, the kept weights to 1e-3 of a matrix's largest."""
    _, ours, parts, losses = both(act, gated, solver)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-3)
    best = parts[int(np.argmin(losses))]
    for got, want in zip(_linears(ours.ffn), _linears(best), strict=True):
        assert np.array_equal(np.asarray(got.w) == 0, want.w == 0)
        np.testing.assert_allclose(got.w, want.w, rtol=0, atol=1e-3 * np.abs(want.w).max())
        np.testing.assert_allclose(got.b, want.b, rtol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_the_iterations_lower_the_error(gated: bool) -> None:
    """Well below SparseGPT's, which is iteration 0; the part of the least error is kept."""
    dense, ours, _, losses = both("gelu", gated)
    assert min(losses[1:]) < 0.8 * losses[0]
    assert len(_linears(ours.ffn)) == len(_linears(dense))
    assert float(jnp.min(ours.losses)) == pytest.approx(min(losses), rel=1e-3)


def test_rounded_tokens_cost_little_error() -> None:
    """With `--matmul=bfloat16` the sums over tokens are of rounded activations."""
    _, exact, *_ = both("gelu", True)
    with matmul_type("bfloat16"):
        _, rounded, *_ = both.__wrapped__("gelu", True)
    assert not np.array_equal(exact.losses, rounded.losses)
    np.testing.assert_allclose(rounded.losses, exact.losses, rtol=0.05)


@functools.cache
def of_activation(family: str, act: str) -> Model:
    """The small model of a family with another activation."""
    arch, *_ = hf.specs(CONFIGS[family] | {ACTIVATION[family]: act})
    return model(family)._replace(arch=arch)


@functools.cache
def run(name: str, family: str, act: str) -> tuple[Model, Outcome]:
    """The model pruned by half."""
    arguments = {"iterations": ITERATIONS} if name == "sparsellm" else {}
    m = of_activation(family, act)
    return prune(m, METHODS[name](**arguments), tokens(8), Request(0.5))


def block_error(family: str, act: str, pruned: Model) -> float:
    """The mean squared error of block 0's output on the calibration tokens."""
    m = of_activation(family, act)
    x = embed(m.arch, m.non_block, tokens(8))
    outputs = [np.asarray(run_block(m, b, x)[0]) for b in (pruned.blocks[0], m.blocks[0])]
    return float(np.mean((outputs[0] - outputs[1]).astype(np.float64) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "act"),
    [
        ("opt", "gelu"),
        ("opt", "silu"),
        ("llama", "gelu_pytorch_tanh"),
        ("llama", "relu"),
        ("llama-gqa", "gelu_new"),
    ],
)
def test_a_block_of_any_activation_has_less_error_than_sparsegpts(family: str, act: str) -> None:
    """On the same calibration tokens; the iterations lower the error in every block."""
    pruned, outcome = run("sparsellm", family, act)
    assert all(min(losses[1:]) < losses[0] for losses in outcome.details["loss"])
    assert block_error(family, act, pruned) < block_error(
        family, act, run("sparsegpt", family, act)[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "field", "act"),
    [(tiny.OPT, "activation_function", "gelu"), (tiny.GQA, "hidden_act", "gelu_pytorch_tanh")],
)
def test_a_run_on_a_checkpoint_of_another_activation_lowers_its_errors(
    config: dict[str, Any], field: str, act: str, tmp_path: pathlib.Path
) -> None:
    config = {**config, field: act}
    source = tiny.write(
        tmp_path / "dense", tiny.state_of(config, tiny.random_model(config)), config
    )
    calibration, output = tmp_path / "calibration.npy", tmp_path / "out"
    np.save(calibration, tiny.tokens(16))
    code = prune_runs.call(
        [
            f"--model={source}",
            "--method=sparsellm",
            "--sparsity=0.5",
            f"--calibration={calibration}",
            "--eval_data=",
            f"--output={output}",
        ]
    )
    assert code == 0
    report = json.loads((output / "pruning_report.json").read_text())
    assert all(min(losses[1:]) < losses[0] for losses in report["details"]["loss"])
    assert json.loads((output / "config.json").read_text())[field] == act
