"""A model whose blocks differ in width is pruned again by the command, and its report adds up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.arch import logits
from models.checkpoint.reader import open_checkpoint
from reference import tiny, torch_models
from reference.prune_runs import call, report_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_samples"),
]
RAGGED = {
    **tiny.GQA,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "num_hidden_layers": 3,
    "model_type": "topiary_llama",
    "architectures": ["PrunedForCausalLM"],
    "widths": {"heads": [2, 4, 3], "neurons": [24, 40, 32]},
    "biases": [],
}
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (8, 24), np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the project's own type, and its tokens beside it."""
    root = tmp_path_factory.mktemp("ragged")
    state = tiny.state_of(RAGGED, tiny.random_model(RAGGED))
    np.save(root / "tokens.npy", TOKENS)
    return tiny.write(root / "model", state, RAGGED)


def prune(model: Path, tokens: Path, out: Path, *more: str) -> dict[str, Any]:
    data = [f"--calibration={tokens}", f"--eval_data={tokens}", "--calibration_batch=4"]
    assert call([f"--model={model}", f"--output={out}", *data, "--mesh=data=1", *more]) == 0
    return report_of(out)


def widths(directory: Path) -> dict[str, list[int]]:
    """Read the widths of a checkpoint from its tensors."""
    blocks = open_checkpoint(directory).model.blocks
    return {
        "heads": [b.k.w.shape[0] // 4 for b in blocks],
        "neurons": [b.up.w.shape[0] for b in blocks],
    }


@pytest.mark.parametrize(
    "method",
    [
        'flap(structure="AL-AM", bias=False)',
        "wanda_sp",
        'llmrank(scope="global")',
        "sleb(latter_barrier=0)",
    ],
)
def test_the_report_of_a_second_round_adds_up(method: str, model: Path, tmp_path: Path) -> None:
    tokens, out = model.parent / "tokens.npy", tmp_path / "out"
    report = prune(model, tokens, out, f"--method={method}", "--sparsity=0.34")
    record = json.loads((out / "pruning.json").read_text())
    came_in, left = widths(model), widths(out)
    kept_blocks = record.get("kept_blocks", [0, 1, 2])
    for group, counts in report["details"].get("units", {}).items():
        assert counts == came_in[group]
        assert [len(k) for k in report["details"][f"kept_{group}"]] == left[group]
    if record["kind"] == "blocks":
        assert left == {name: [came_in[name][i] for i in kept_blocks] for name in came_in}
    for i in range(3 if record["kind"] == "units" else 0):
        linear = record["linears"][f"model.layers.{i}.mlp.up_proj"]
        assert len(linear["rows"]) == came_in["neurons"][i] - left["neurons"][i]
    dense, pruned = (open_checkpoint(d) for d in (model, out))
    assert report["parameters"] == {"dense": dense.parameters, "pruned": pruned.parameters}
    theirs = torch_models.logits(torch_models.load(out), TOKENS)
    np.testing.assert_allclose(logits(pruned.model, TOKENS), theirs, atol=1e-3)
    assert "<svg" in (out / "report.html").read_text()


def test_a_third_round_follows(model: Path, tmp_path: Path) -> None:
    tokens = model.parent / "tokens.npy"
    for k in (1, 2):
        source = model if k == 1 else tmp_path / "1"
        more = ['--method=flap(structure="AL-AM")', "--sparsity=0.2"]
        prune(source, tokens, tmp_path / str(k), *more)
    assert sum(widths(tmp_path / "2")["neurons"]) < sum(widths(tmp_path / "1")["neurons"])
