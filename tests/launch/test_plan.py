"""A plan compiles what a run compiles, counts it right, and needs no weights."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from launch import plan
from launch.flags.cli import run
from models.errors import InputError
from models.families import hf
from models.published import MODELS
from reference import tiny

METHODS = (
    "magnitude",
    "wanda",
    "multiflow",
    "sparsegpt",
    "admm",
    "sparsellm",
    'sparsellm(variant="official")',
    "llmrank",
    'llmrank(repair="refit")',
    "flap",
    'flap(variant="official")',
    "wanda_sp",
    'wanda_sp(scope="global", repair="bias")',
    "magnitude_sp",
    "sleb(early_barrier=0)",
    'sleb(latter_barrier=0, search="similarity", repair="flatten")',
)


def values(directory: pathlib.Path, *flags: str) -> dict[str, Any]:
    shape = (
        "--calibration_samples=12",
        "--calibration_length=16",
        "--calibration_batch=4",
        "--mesh=data=2,model=2",
    )
    return plan.options().parse([f"--model={directory}", "--sparsity=0.5", *shape, *flags])


@pytest.fixture
def shapes_only(tmp_path: pathlib.Path) -> pathlib.Path:
    """A model's configuration without its weights."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA))
    return tmp_path


@pytest.mark.parametrize(
    "method",
    [m if m == "wanda" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_every_method_can_be_planned_without_weights(
    method: str,
    shapes_only: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan, "flops_per_second", lambda dtype: 1e9)
    result = plan.plan(values(shapes_only, f"--method={method}"))
    json.dumps(result)
    programs = {p["name"]: p for p in result["programs"]}
    blocks, steps = tiny.LLAMA["num_hidden_layers"], 3
    if method == "magnitude" or method == "magnitude_sp":
        assert "embedding" not in programs, "the weights alone decide"
    elif not method.startswith("sleb"):  # it looks at one micro-batch more
        assert programs["embedding"]["calls"] % steps == 0
    calls: Counter[str] = Counter()  # a program is compiled for each placement of its arguments
    for p in result["programs"]:
        calls[p["name"]] += p["calls"]
    if method.startswith(("wanda_sp", "sparsegpt", "wanda")) and "global" not in method:
        assert calls["statistics"] == steps * blocks
        assert calls["pruned block"] == steps * (blocks - 1)
    assert (
        result["fits"]
        and result["memory"]["offload"] == "device"
        and result["devices"]["mesh"] == {"data": 2, "model": 2}
    )
    assert all(p["memory"] > 0 and not p["failed"] for p in programs.values())
    assert result["total"]["device_bytes"] == max(p["peak"] for p in result["programs"])
    assert result["total"]["seconds_at_peak"] == pytest.approx(result["total"]["flops"] / 4e9)
    plan.show(result, Console())
    assert "it fits" in capsys.readouterr().out


def test_the_work_of_a_block_is_its_matrices_and_its_attention(
    shapes_only: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "flops_per_second", lambda dtype: 1.0)
    result = plan.plan(values(shapes_only, "--method=wanda"))
    (block,) = (p for p in result["programs"] if p["name"] == "pruned block")
    width, ffn, tokens, length = (
        tiny.LLAMA["hidden_size"],
        tiny.LLAMA["intermediate_size"],
        4 * 16,
        16,
    )
    assert (
        block["flops"]
        == 2 * tokens * (4 * width**2 + 3 * width * ffn) + 2 * 2 * tokens * length * width
    )
    assert block["collectives"], "a linear whose rows lie on two devices is not gathered"
    _, non_block, blocks = hf.specs(tiny.LLAMA)
    parameters = sum(
        math.prod(s.shape) for s in jax.tree.leaves((non_block, blocks), is_leaf=hf.is_spec)
    )
    assert (
        result["parameters"] == parameters
        and result["memory"]["disk"]["output_at_most"] == 4 * parameters
    )


def test_a_token_file_has_its_own_shape(shapes_only: pathlib.Path) -> None:
    np.save(shapes_only / "tokens.npy", np.zeros((5, 7), np.int32))
    flags = values(shapes_only, f"--calibration={shapes_only / 'tokens.npy'}")
    assert plan.tokens_shape(plan.frozen(plan.RunConfig, flags), tiny.LLAMA) == (5, 7)
    flags = values(shapes_only, "--calibration_length=0")
    assert plan.tokens_shape(plan.frozen(plan.RunConfig, flags), tiny.LLAMA) == (
        12,
        tiny.LLAMA["max_position_embeddings"],
    )


def test_a_mix_has_the_shape_that_is_asked_for(shapes_only: pathlib.Path) -> None:
    np.save(shapes_only / "tokens.npy", np.zeros((9, 16), np.int32))
    flags = values(shapes_only, f"--calibration={shapes_only / 'tokens.npy'}:1,c4:1")
    assert plan.tokens_shape(plan.frozen(plan.RunConfig, flags), tiny.LLAMA) == (12, 16)
    flags = values(shapes_only, f"--calibration={shapes_only / 'tokens.npy'}:5,c4:1")
    with pytest.raises(InputError, match="has 9 windows, its share of the mix is 10"):
        plan.tokens_shape(plan.frozen(plan.RunConfig, flags), tiny.LLAMA)


def test_published_models_are_known_by_name() -> None:
    assert plan.config_of("LLaMA-2-70B").config["num_key_value_heads"] == 8
    with pytest.raises(InputError, match="llama-2-7b"):
        plan.config_of(None)


@pytest.mark.slow
def test_a_plan_for_absent_tpus_compiles_the_real_programs(tmp_path: pathlib.Path) -> None:
    """libtpu compiles LLaMA-2-7B for the sixteen chips of a v5e-16, in a process of its own.

    Its programs are not kept, as JAX could not read them again.
    """
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu: pip install 'jax[tpu]'")
    method = [
        "--model=llama-2-7b",
        "--method=wanda",
        "--sparsity=0.5",
        "--calibration_length=2048",
        "--dtype=bfloat16",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.plan",
            *method,
            "--topology=v5e:4x4",
            "--mesh=data=4,model=4",
            f"--compilation_cache={tmp_path / 'programs'}",
            f"--json={tmp_path / 'plan.json'}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "TPU_ACCELERATOR_TYPE" not in done.stderr
    assert not list((tmp_path / "programs").iterdir())
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["devices"] == {
        "kind": "TPU v5 lite",
        "topology": "v5e:4x4",
        "mesh": {"data": 4, "model": 4},
    }
    assert found["parameters"] == MODELS["LLaMA-2-7B"].parameters
    assert found["fits"] and found["memory"]["device"]["available"] == 16 << 30
    assert (
        found["total"]["device_bytes"] < 2 * found["parameters"] / 4
    )  # neither the model nor a chip's quarter of it is held
    blocks = [p for p in found["programs"] if p["name"] == "pruned block"]
    assert sum(p["calls"] for p in blocks) == 31 * 16
    assert all(p["memory"] > 0 for p in found["programs"])
    statistics = next(p for p in found["programs"] if p["name"] == "statistics")
    assert statistics["collectives"]["all-gather"] > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--topology=v5e:three"], "--topology=v5e:three is not available"),
        (["--mesh=data=64"], "needs 64 devices"),
        (["--method=sleb(blocks=9)"], "cannot remove 9"),
        (["--pattern=2:4", "--sparsity=0.3"], "leave --sparsity out"),
    ],
)
def test_what_the_run_would_refuse_the_plan_does(
    flags: list[str], says: str, shapes_only: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--model={shapes_only}", "--method=wanda", "--sparsity=0.5", *flags]
    assert run(plan.options(), plan.main, argv) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(8,), (2, 2, 8), (0, 8), (8, 0), ()])
def test_a_token_file_of_a_wrong_shape_is_refused(
    shape: tuple[int, ...], shapes_only: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(shapes_only / "flat.npy", np.zeros(shape, int))
    argv = [f"--model={shapes_only}", "--sparsity=0.5"]
    argv += [f"--calibration={shapes_only / 'flat.npy'}", "--method=wanda"]
    assert run(plan.options(), plan.main, argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --calibration=") and "tokens are [samples, length]" in err


def test_null_where_the_longest_text_is_meant_is_refused(
    shapes_only: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shapes_only / "config.json").write_text(
        json.dumps(tiny.LLAMA | {"max_position_embeddings": None})
    )
    argv = [f"--model={shapes_only}", "--sparsity=0.5", "--method=wanda"]
    assert run(plan.options(), plan.main, argv) == 2
    assert "max_position_embeddings is null: give the longest" in capsys.readouterr().err
