"""What the command writes is what `transformers` loads: real checkpoints pruned, then logits and greedy tokens there against ours."""

from pathlib import Path

import numpy as np
import pytest

from launch import prune
from launch.cli import run
from models.arch import logits
from models.generate import generate
from models.store import open_checkpoint
from reference import torch_models

pytest.importorskip("torch")


def pruned(model: Path, kind: str, shared: Path, out: Path, *args: str) -> None:
    tokens = shared / "golden" / "tokens"
    data = [f"--calibration={tokens / f'{kind}_calib.npy'}", f"--eval_data={tokens / f'{kind}_eval.npy'}", "--eval_windows=1"]
    argv = [f"--model={model}", f"--output={out}", *data, "--calibration_batch=4", "--mesh=data=1", *args]
    assert run(prune.options(), prune.main, argv) == 0


def assert_loads(directory: Path, tokens: np.ndarray) -> None:
    """The same logits, and the same 32 greedy tokens after the first ones."""
    ours, theirs = open_checkpoint(directory).model, torch_models.load(directory)
    np.testing.assert_allclose(np.asarray(logits(ours, tokens)), torch_models.logits(theirs, tokens), atol=1e-4)
    prompts = tokens[:, :24]
    np.testing.assert_array_equal(generate(ours, prompts, 32), torch_models.greedy(theirs, prompts, 32))


@pytest.mark.parametrize("method", ["llmrank", 'llmrank(scope="global")', "wanda", "flap", "flap(refit=True)", "wanda_sp"])
def test_tiny_opt(method: str, shared: Path, tmp_path: Path) -> None:
    pruned(shared / "models/tiny-opt", "tiny", shared, tmp_path / "out", f"--method={method}", "--sparsity=0.3")
    assert_loads(tmp_path / "out", np.load(shared / "golden/tokens/tiny_eval.npy")[:2, :64])


@pytest.mark.parametrize("method", ["llmrank", "flap"])
def test_smollm2(method: str, smollm2: Path, shared: Path, tmp_path: Path) -> None:
    pruned(smollm2, "smollm2", shared, tmp_path / "out", f"--method={method}", "--sparsity=0.3")
    assert_loads(tmp_path / "out", np.load(shared / "golden/tokens/smollm2_eval.npy")[:1, :128])
