"""The device benchmark finds results that differ, counts work, and writes what it measured."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import bench
from launch.benchmarks import device, device_checks, device_speed
from launch.benchmarks.device_checks import MIXTURE, Case, Check
from launch.benchmarks.device_programs import SHAPES, Inputs, Work, of_types, solvers
from launch.benchmarks.device_results import (
    Distance,
    Result,
    dense_shaped,
    distance,
    on_device,
    with_noise,
)
from launch.flags.cli import run
from models.arch import linear_of
from models.init import init_model
from pruning.methods import METHODS
from pruning.types import Request, prune

LLAMA = "embedded:tiny-llama"


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (LLAMA, "wanda"),
        ("embedded:tiny-opt", "magnitude_sp"),
        pytest.param(MIXTURE, "reap", marks=pytest.mark.slow),
    ],
)
def test_a_cpu_gives_what_the_first_one_gives(model: str, method: str) -> None:
    check = device_checks.check_method(Case(model, method), jax.devices()[1])
    assert check.passed and check.distance == Distance(0, 0, 0)
    assert check.rounding is not None and 0 < check.rounding.perplexity < 1e-5


def test_a_device_that_computes_otherwise_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned_on = device_checks.pruned_on

    def coarse(at: jax.Device, model: Any, *args: Any) -> Result:
        """As a device that computes with two digits."""
        wrong = at == jax.devices()[1]
        return pruned_on(at, lambda: with_noise(model(), 0.02) if wrong else model(), *args)

    monkeypatch.setattr(device_checks, "pruned_on", coarse)
    check = device_checks.check_method(Case(LLAMA, "wanda"), jax.devices()[1])
    assert not check.passed
    assert check.distance.masks > device_checks.BOUNDS.masks
    assert check.distance.perplexity > device_checks.BOUNDS.perplexity


@pytest.mark.slow
def test_generation_and_sharding_are_compared() -> None:
    devices = jax.devices()
    assert device_checks.check_generation(MIXTURE, devices[1]).passed
    check = device_checks.check_sharding("model=2", "wanda", devices)
    assert check.passed and check.name == "wanda, 1 x 2 devices"


def test_every_method_is_compared_on_the_models_that_it_prunes() -> None:
    cases = device_checks.cases(list(METHODS))
    compared = {(c.method, c.model) for c in cases}
    dense = {(m, model) for m in METHODS for model in device_checks.MODELS[:2] if m != "reap"}
    assert dense | {("reap", MIXTURE)} <= compared
    assert {c.matmul for c in cases} == {"float32", "bfloat16", "auto"}
    assert {c.method for c in device_checks.cases(["flap"])} == {"flap"}


def test_distance_counts_masks_and_relates_weights_to_their_matrix() -> None:
    a = np.asarray([[1.0, 0.0], [2.0, 4.0]], np.float32)
    b = np.asarray([[4.5, 3.0], [2.0, 5.0]], np.float32)  # the first row's masks differ
    found = distance(Result(({"q": a},), 2.0), Result(({"q": b},), 4.0))
    assert found == Distance(masks=0.25, weights=0.2, perplexity=0.5)


@pytest.mark.parametrize("method", ["magnitude_sp", "sleb", "two_ssp"])
def test_what_was_cut_stands_as_zeros_in_the_dense_shape(method: str) -> None:
    config = device_checks._MIXTURE | {"model_type": "llama", "num_hidden_layers": 4}
    model = init_model(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 256, (4, 16), np.int32)
    build = METHODS[method]()
    if method != "magnitude_sp":
        build = dataclasses.replace(build, repair="none")  # type: ignore[type-var]
    pruned, outcome = prune(model, build, tokens, Request(0.5))
    zeros = entries = 0
    for block, matrices in zip(model.blocks, dense_shaped(model, pruned, outcome), strict=True):
        for slot, got in matrices.items():
            dense = np.asarray(linear_of(block, slot).w)
            assert np.array_equal(got, np.where(got == 0, 0, dense)), slot
            zeros, entries = zeros + np.sum(got == 0), entries + got.size
    assert zeros / entries == pytest.approx(0.5, abs=0.1)


def test_on_device_holds_in_all_threads_and_ends() -> None:
    with on_device(jax.devices()[2]):
        assert jnp.ones(()).device == jax.devices()[2]
    assert jnp.ones(()).device == jax.devices()[0]


def test_operations_are_those_of_the_formulas() -> None:
    inputs = Inputs(SHAPES["tiny"], "float32")
    work = {w.name: w for w in of_types("float32", inputs)}
    d, f, heads, kv, vocab, n, t = 128, 256, 4, 2, 1024, 4 * 128, 128
    linears = 2 * n * (2 * d * d + 2 * d * d * kv // heads + 3 * d * f)
    attention = 2 * 2 * n * t * d  # queries with keys, weights with values
    assert work["forward"].flops == linears + attention
    assert work["Gram of 256"].flops == 2 * n * f * f
    head = 2 * 4 * 127 * d * (vocab + 1)
    assert work["SLEB, a candidate"].flops == linears + attention + head
    for own in work.values():
        own.run()
    of_solvers = {w.name: w for w in solvers(inputs)}
    # 20 rounds of W H^-1 for gate and up, and two products with H for the residual and the error.
    assert of_solvers["ADMM, gate, up"].flops == 2 * 22 * 2 * f * d * d


class FakeDevice:
    """A device whose memory stands as given, one figure a call."""

    def __init__(self, *stats: dict[str, int] | None) -> None:
        self._stats = list(stats)

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats.pop(0)


@pytest.mark.parametrize(
    ("stats", "measured"),
    [
        ([{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"peak_bytes_in_use": 12}], 7),
        ([{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"peak_bytes_in_use": 9}], None),
        ([None, None], None),
    ],
)
def test_memory_is_measured_where_a_program_sets_a_new_peak(
    stats: Sequence[dict[str, int] | None], measured: int | None
) -> None:
    ran = []
    work = Work("", "float32", lambda: ran.append(1), 1.0, memory=6)
    found = device_speed.memory_of(work, FakeDevice(*stats))  # type: ignore[arg-type]
    assert found == {"planned": 6, "measured": measured} and ran


def test_a_program_that_does_not_fit_leaves_the_others() -> None:
    found: list[int] = []
    notes: list[str] = []

    def works() -> Iterator[int]:
        yield 1
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 7 GiB")

    with device_speed.noting_what_does_not_fit("the second", notes):
        found.extend(works())
    assert found == [1] and notes == ["the second does not fit into the device's memory"]
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        device_speed.noting_what_does_not_fit("", notes),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL")


def test_a_result_that_differs_gives_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    far = Check("wanda", LLAMA, "float32", Distance(0.5, 0, 0), Distance(0, 0, 0), False)
    monkeypatch.setattr(device, "run_checks", lambda *_: [far])
    argv = ["--what=device", "--device_methods=wanda", "--device_shapes=none"]
    assert run(bench.options(), bench.main, argv) == device.DIFFERS
    assert "differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", ["--device_shapes=13b", "--device_methods=wanda,typo", "--device_shapes=,"]
)
def test_names_are_checked(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--what=device", "--device_methods=none", "--device_shapes=none", flag]
    assert run(bench.options(), bench.main, argv) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(LLAMA, "admm"), Case(LLAMA, "sparsegpt", dtype="bfloat16")])
def test_a_device_that_rounds_in_another_order_passes(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes other micro-batches, so its sums have other partial sums."""
    pruned_on = device_checks.pruned_on

    def reordered(at: jax.Device, *args: Any) -> Result:
        *others, runtime = args
        own = dataclasses.replace(runtime, batch=3) if at == jax.devices()[1] else runtime
        return pruned_on(at, *others, own)

    monkeypatch.setattr(device_checks, "pruned_on", reordered)
    check = device_checks.check_method(case, jax.devices()[1])
    assert check.passed and check.distance.masks > device_checks.BOUNDS.masks
    # A rounding of the embeddings changes about as much.
    assert check.rounding is not None
    assert 0.1 < check.distance.masks / check.rounding.masks < 10


@pytest.mark.slow
def test_the_whole_command_on_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--what=device", "--device_shapes=tiny", "--runs=2", f"--json={tmp_path / 'd.json'}"]
    assert run(bench.options(), bench.main, argv) == 0
    result = json.loads((tmp_path / "d.json").read_text())
    assert {c["name"].partition(",")[0] for c in result["checks"]} == {*METHODS, "greedy tokens"}
    assert all(c["passed"] for c in result["checks"])
    assert any("1 x 8 devices" in c["name"] for c in result["checks"])
    assert all(rate > 1e8 for rate in result["peaks"].values())
    tiny = result["speed"]["tiny"]
    assert all(p["share_of_peak"] > 0 and len(p["seconds"]) == 2 for p in tiny["programs"])
    assert [g["name"] for g in tiny["generation"]] == [
        "generation, float32",
        "generation, bfloat16",
    ]
    output = capsys.readouterr()
    assert "SparseLLM" in output.out
    assert "this device does not report its memory" in output.out + output.err
