"""The page on fine-tuning runs: peft and transformers lose zeros, and the commands restore them."""

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch.flags import cli
from models.checkpoint.hub import resolve
from models.checkpoint.masks import Zeros, lost_zeros
from reference.pages import code, launch_commands

pytestmark = [
    pytest.mark.slow,
    # peft asks transformers 5 under the older name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

PAGE = "docs/finetuning.md"


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """Run the page in a directory of its own, and return its commands with their exit codes."""
    pytest.importorskip("peft", reason="needs peft")
    _, *commands = launch_commands(PAGE)
    lora, trainer = code(PAGE, "python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        prune("PRUNED")
        # A module of its own, where transformers looks the callback's class up.
        for block in (lora, trainer):
            exec(compile(block, PAGE, "exec"), {"__name__": "page"})
        yield {" ".join(flags): run(name, flags) for name, flags in commands}


def prune(directory: str) -> None:
    """Write the embedded model with the smaller half of each linear zero, in place of a run."""
    shutil.copytree(resolve("embedded:tiny-llama"), directory)
    file = Path(directory) / "model.safetensors"
    # In float32, so that merges can be compared to its rounding.
    state = {name: x.astype(np.float32) for name, x in load_file(file).items()}
    config = Path(directory) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    for name, x in state.items():
        if name.endswith("proj.weight"):
            state[name] = np.where(np.abs(x) > np.median(np.abs(x)), x, np.float32(0))
    save_file(state, file, metadata={"format": "pt"})


def run(name: str, flags: list[str]) -> int:
    module = importlib.import_module(f"launch.{name}")
    return cli.run(module.options(), module.main, flags)


def zeros_of(directory: str) -> dict[str, Any]:
    """Return where the linears of a checkpoint are zero."""
    state = load_file(Path(directory) / "model.safetensors")
    return {n: x == 0 for n, x in state.items() if n.endswith("proj.weight")}


def totals(directory: str) -> Zeros:
    return Zeros(*map(sum, zip(*lost_zeros("PRUNED", directory).values(), strict=True)))


def test_the_exit_codes_say_what_was_lost(codes: dict[str, int]) -> None:
    assert {k.removeprefix("--model=PRUNED --check="): v for k, v in codes.items()} == {
        "MERGED": 1,
        "MERGED --apply --output=SPARSE": 0,
        "ADAPTER --apply --output=SPARSE_TOO": 0,
        "PLAIN --apply --output=PLAIN_SPARSE": 0,
        "KEPT": 0,
    }


@pytest.mark.parametrize("trained", ["MERGED", "ADAPTER", "PLAIN"])
def test_training_loses_zeros(trained: str, codes: dict[str, int]) -> None:
    found = totals(trained)
    assert found.pruned > 0.45 * found.entries and found.lost > 0.9 * found.pruned


@pytest.mark.parametrize("restored", ["SPARSE", "SPARSE_TOO", "PLAIN_SPARSE", "KEPT"])
def test_restored_zeros_are_the_pruned_ones(restored: str, codes: dict[str, int]) -> None:
    pruned, after = zeros_of("PRUNED"), zeros_of(restored)
    assert pruned.keys() == after.keys() and len(pruned) > 7
    for name, zeros in pruned.items():
        assert np.count_nonzero(after[name]) == np.count_nonzero(zeros), name
        np.testing.assert_array_equal(after[name], zeros)


def test_our_merge_is_that_of_peft_under_the_mask(codes: dict[str, int]) -> None:
    merged, own = (load_file(f"{d}/model.safetensors") for d in ("MERGED", "SPARSE_TOO"))
    for name, mask in zeros_of("PRUNED").items():
        wanted = np.where(mask, 0, merged[name])
        np.testing.assert_allclose(own[name], wanted, rtol=0, atol=2e-7 * np.abs(wanted).max())
    pruned = load_file("PRUNED/model.safetensors")
    moved = [n for n in merged if not np.array_equal(merged[n], pruned[n])]
    assert sorted(moved) == sorted(zeros_of("PRUNED"))


def test_a_restored_model_loads_and_is_the_masked_one(codes: dict[str, int]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    masks = zeros_of("PRUNED")
    wanted = AutoModelForCausalLM.from_pretrained("MERGED")
    with torch.no_grad():
        for name, weight in wanted.named_parameters():
            if name in masks:
                weight.mul_(torch.from_numpy(~masks[name]))
    for directory in ("SPARSE", "SPARSE_TOO"):
        tokens = AutoTokenizer.from_pretrained(directory)("Once there was", return_tensors="pt")
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            ours, theirs = (m(input_ids=tokens.input_ids).logits for m in (model, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
