"""The command prunes mixtures of experts, and transformers loads what it writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch import prune
from launch.flags.cli import run
from models.arch import logits
from models.checkpoint.reader import open_checkpoint
from reference import torch_models
from reference.families import FAMILIES

pytestmark = pytest.mark.slow
METHODS = {
    "reap": ["--method=reap", "--sparsity=0.34"],
    "wanda": ["--method=wanda", "--sparsity=0.5"],
    "2:4": ["--method=sparsegpt", "--sparsity=0.5", "--pattern=2:4"],
    "flap": ["--method=flap(bias=False, refit=True)", "--sparsity=0.3"],
    "ragged": ["--method=flap(structure='AL-AM')", "--sparsity=0.3"],
    "llmrank": ["--method=llmrank", "--sparsity=0.3"],
    "sleb": ["--method=sleb(blocks=1)"],
}
NAMES = ("mixtral", "qwen3_moe with dense blocks, biased, sliding", "olmoe")


@pytest.mark.parametrize(
    ("name", "method"),
    [(n, m) for n in NAMES for m in METHODS if "dense" in n or m in ("reap", "flap", "ragged")],
)
def test_a_pruned_mixture_loads_in_transformers(name: str, method: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    torch_models.save_random(FAMILIES[name], tmp_path / "dense", scale=0.2)
    tokens = np.random.default_rng(0).integers(3, 96, (12, 24), np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    argv = [
        f"--model={tmp_path / 'dense'}",
        f"--calibration={tmp_path / 'tokens.npy'}",
        f"--eval_data={tmp_path / 'tokens.npy'}",
        "--calibration_batch=4",
        "--mesh=data=1",
        f"--output={tmp_path / 'out'}",
        *METHODS[method],
    ]
    assert run(prune.options(), prune.main, argv) == 0
    ours, theirs = open_checkpoint(tmp_path / "out"), torch_models.load(tmp_path / "out")
    got = np.asarray(logits(ours.model, tokens))
    np.testing.assert_allclose(got, torch_models.logits(theirs, tokens), atol=1e-4, rtol=1e-4)
    report = json.loads((tmp_path / "out/pruning_report.json").read_text())
    sparsity = report["sparsity"]
    assert abs(sparsity["prunable"] - sparsity["target"]) < 0.13
    dense = open_checkpoint(tmp_path / "dense")
    assert len(sparsity["per_linear"]) == sum(
        len(dense.model.arch.slots_of(block)) for block in dense.specs
    )
    if method == "reap":
        record = json.loads((tmp_path / "out/pruning.json").read_text())
        for i, kept in enumerate(record["kept_experts"]):
            of_block = {n: v for n, v in sparsity["per_linear"].items() if f"layers.{i}." in n}
            of_kept = {n for n in of_block for e in kept or () if f"experts.{e}." in n}
            gone = {n for n, share in of_block.items() if share == 1.0}
            assert bool(gone) == (kept is not None) and not gone & of_kept
