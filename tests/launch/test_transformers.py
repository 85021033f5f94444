"""transformers loads pruned checkpoints with our logits and greedy tokens."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch import prune
from launch.flags.cli import run
from models.arch import logits
from models.checkpoint.reader import open_checkpoint
from models.generate import generate
from reference import torch_models

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_samples")]

pytest.importorskip("torch")


def pruned(model: Path, kind: str, shared: Path, out: Path, *args: str) -> None:
    tokens = shared / "golden" / "tokens"
    data = [
        f"--calibration={tokens / f'{kind}_calib.npy'}",
        f"--eval_data={tokens / f'{kind}_eval.npy'}",
        "--eval_windows=1",
    ]
    argv = [
        f"--model={model}",
        f"--output={out}",
        *data,
        "--calibration_batch=4",
        "--mesh=data=1",
        *args,
    ]
    assert run(prune.options(), prune.main, argv) == 0


def assert_loads(directory: Path, tokens: np.ndarray) -> None:
    """The same logits, and the same 32 greedy tokens after the first ones."""
    ours, theirs = open_checkpoint(directory).model, torch_models.load(directory)
    np.testing.assert_allclose(
        np.asarray(logits(ours, tokens)), torch_models.logits(theirs, tokens), atol=1e-4
    )
    prompts = tokens[:, :24]
    np.testing.assert_array_equal(
        generate(ours, prompts, 32), torch_models.greedy(theirs, prompts, 32)
    )


@pytest.mark.parametrize("method", ["llmrank", "flap", "wanda_sp"])
def test_transformers_loads_a_pruned_tiny_opt(method: str, shared: Path, tmp_path: Path) -> None:
    pruned(
        shared / "models/tiny-opt",
        "tiny",
        shared,
        tmp_path / "out",
        f"--method={method}",
        "--sparsity=0.3",
    )
    assert_loads(tmp_path / "out", np.load(shared / "golden/tokens/tiny_eval.npy")[:2, :64])


def test_transformers_loads_a_pruned_smollm2(smollm2: Path, shared: Path, tmp_path: Path) -> None:
    pruned(
        smollm2,
        "smollm2",
        shared,
        tmp_path / "out",
        "--method=llmrank",
        "--sparsity=0.3",
        "--calibration_samples=4",
    )
    assert_loads(tmp_path / "out", np.load(shared / "golden/tokens/smollm2_eval.npy")[:1, :128])


SLEB = ['sleb(variant="official")', 'sleb(units="sublayers")', 'sleb(search="influence")']


FLATTEN = 'sleb(search="similarity", repair="flatten")'


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("tiny-llama", method) for method in (*SLEB, FLATTEN)), ("tiny-opt", "sleb")],
)
def test_transformers_loads_a_model_with_fewer_blocks(
    name: str, method: str, shared: Path, tmp_path: Path
) -> None:
    pruned(
        shared / "models" / name,
        "tiny",
        shared,
        tmp_path / "out",
        f"--method={method}",
        "--sparsity=0.4",
        "--calibration_samples=4",
    )
    assert_loads(tmp_path / "out", np.load(shared / "golden/tokens/tiny_eval.npy")[:2, :64])
    report, record = (
        json.loads((tmp_path / "out" / f).read_text())
        for f in ("pruning_report.json", "pruning.json")
    )
    kept = record["kept_blocks"]
    assert record["kind"] == "blocks" and json.loads((tmp_path / "out/config.json").read_text())[
        "num_hidden_layers"
    ] == len(kept)
    assert sum(report["sparsity"]["per_linear"].values()) > 0
    for linear, share in report["sparsity"]["per_linear"].items():
        block = int(linear.split(".layers.")[1].split(".")[0])
        assert share == 1 if block not in kept else "sublayers" in method or share < 0.01
    if "sublayers" not in method:
        assert (
            len(kept) == 3
            and report["sparsity"]["prunable"] == pytest.approx(0.4, abs=0.01)
            and not report["warnings"]
        )


def test_transformers_reads_a_large_model_from_its_files(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same logits."""
    pytest.importorskip("accelerate")
    monkeypatch.setattr("launch.run.export.fits_in_memory", lambda size: False)
    pruned(
        shared / "models/tiny-llama",
        "tiny",
        shared,
        tmp_path / "out",
        "--method=flap",
        "--sparsity=0.3",
    )
    message = json.loads((tmp_path / "out/pruning_report.json").read_text())["load_back"][
        "transformers"
    ]
    assert float(message.removeprefix("largest difference of the logits ")) < 1e-4
