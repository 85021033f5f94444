"""A pruned model is written in the type of its source unless another one is asked for."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from reference import tiny
from reference.prune_runs import call, report_of

pytestmark = pytest.mark.usefixtures("no_samples")
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (4, 24), np.int32)
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def source(root: Path, dtype: str) -> Path:
    """Write a model in a type, with enough tokens that its header is a small part of the file."""
    config = {**tiny.GQA, "vocab_size": 2048}
    state = tiny.state_of(config, tiny.random_model(config))
    np.save(root / "tokens.npy", TOKENS)
    return tiny.write(root / "model", {n: x.astype(TYPES[dtype]) for n, x in state.items()}, config)


def prune(root: Path, *more: str) -> dict[str, Any]:
    tokens = root / "tokens.npy"
    data = [f"--calibration={tokens}", f"--eval_data={tokens}", "--mesh=data=1"]
    out = f"--output={root / 'out'}"
    assert call([f"--model={root / 'model'}", out, *data, "--sparsity=0.5", *more]) == 0
    return report_of(root / "out")


@pytest.mark.parametrize(
    "source_type",
    ["float16", *(pytest.param(t, marks=pytest.mark.slow) for t in ("bfloat16", "float32"))],
)
@pytest.mark.parametrize("method", ["magnitude", pytest.param("sparsegpt", marks=pytest.mark.slow)])
def test_the_source_type_is_kept_by_default(
    source_type: str, method: str, tmp_path: Path, no_transformers: None
) -> None:
    model = source(tmp_path, source_type)
    report = prune(tmp_path, f"--method={method}")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {x.dtype.name for x in stored.values()} == {source_type}
    size = (model / "model.safetensors").stat().st_size
    assert report["bytes"]["dense"] == size
    assert report["bytes"]["pruned"] == pytest.approx(size, rel=0.01)
    assert report["dtype"] == {
        "source": source_type,
        "computed": "float32",
        "stored": source_type,
    }
    assert not [w for w in report["warnings"] if "bytes" in w]


@pytest.mark.parametrize("by", ["topiary", "none"])
def test_a_check_that_is_not_made_is_named(by: str, tmp_path: Path) -> None:
    source(tmp_path, "float32")
    report = prune(tmp_path, "--method=magnitude", f"--check={by}")
    assert report["checks"] == {
        "topiary": True if by == "topiary" else None,
        "transformers": None,
    }
    assert report["load_back"]["transformers"] == f"not checked: --check={by}"


@pytest.mark.slow
def test_a_norm_that_a_method_scales_is_compared_as_it_is_stored(tmp_path: Path) -> None:
    source(tmp_path, "float16")
    assert not prune(tmp_path, "--method=minitron(hidden=0.5)")["warnings"]


@pytest.mark.slow
def test_a_wider_type_is_said(tmp_path: Path) -> None:
    source(tmp_path, "float16")
    report = prune(tmp_path, "--method=wanda", "--dtype=float32")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {x.dtype.name for x in stored.values()} == {"float32"}
    (said,) = [w for w in report["warnings"] if "bytes" in w]
    assert "stores float32, 2.0 times the source's bytes" in said and "--dtype=auto" in said
    assert report["checks"]["transformers"] is True


@pytest.mark.slow
def test_types_agree_about_a_model_that_is_pruned_by_its_weights(tmp_path: Path) -> None:
    """Weights that stay are not changed, so every type holds the same numbers."""
    source(tmp_path, "float16")
    results = {}
    for dtype in ("auto", "float32", "float16"):
        report = prune(tmp_path, "--method=magnitude", f"--dtype={dtype}")
        (figures,) = report["perplexity"].values()
        tensors = load_file(tmp_path / "out/model.safetensors")
        results[dtype] = figures["pruned"], {n: x.astype(float) for n, x in tensors.items()}
        assert report["checks"]["transformers"] is True
    for dtype in ("float32", "float16"):
        for name, x in results["auto"][1].items():
            np.testing.assert_array_equal(x, results[dtype][1][name])
    assert results["auto"][0] == results["float32"][0]
    assert results["float16"][0] == pytest.approx(results["auto"][0], rel=5e-3)


@pytest.mark.slow
def test_a_run_in_bfloat16_keeps_nearly_the_same_weights(
    tmp_path: Path, no_transformers: None
) -> None:
    kept, perplexity = [], []
    for matmul in ("auto", "bfloat16"):
        out = tmp_path / matmul
        flags = ["--model=embedded:tiny-llama", "--method=wanda", "--sparsity=0.5"]
        flags += ["--calibration_samples=4", "--calibration_length=64", "--eval_windows=4"]
        assert call([*flags, "--eval_length=64", f"--matmul={matmul}", f"--output={out}"]) == 0
        report = report_of(out)
        assert report["settings"]["matmul"] == matmul
        perplexity += [p["pruned"] for p in report["perplexity"].values()]
        kept.append({n: w != 0 for n, w in load_file(out / "model.safetensors").items()})
    equal = sum(np.sum(kept[0][n] == kept[1][n]) for n in kept[0])
    assert 0.995 < equal / sum(mask.size for mask in kept[0].values()) < 1
    assert perplexity[1] == pytest.approx(perplexity[0], rel=0.01)
    assert perplexity[1] != perplexity[0]
