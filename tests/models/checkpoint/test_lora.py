"""Adapters are merged as LoRA's equation says, and what is no plain LoRA is refused."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.checkpoint.masks import lost_zeros, restore_zeros
from models.errors import InputError
from reference import tiny

CONFIG = {**tiny.GQA, "num_hidden_layers": 1}
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
RANK = 4
PLAIN = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", "init_lora_weights": True}


def checkpoint(directory: pathlib.Path, dtype: Any = np.float32, **fields: Any) -> dict[str, Any]:
    """Write a checkpoint with every third entry of all matrices zero, and return its tensors."""
    state = tiny.state_of(CONFIG, tiny.random_model(CONFIG))
    for name, x in state.items():
        state[name] = x.astype(dtype)
        state[name].flat[:: 3 if x.ndim == 2 else x.size + 1] = 0
    if fields.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    tiny.write(directory, state, CONFIG | fields)
    return state


def adapter(directory: pathlib.Path, shapes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Write an adapter as peft does, and return its tensors."""
    rng = np.random.default_rng(1)
    directory.mkdir(exist_ok=True)
    state = {}
    for name, (out, into) in shapes.items():
        for part, shape in (("A", (RANK, into)), ("B", (out, RANK))):
            x = rng.standard_normal(shape).astype(np.float32)
            state[f"base_model.model.{name}.lora_{part}.weight"] = x
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(PLAIN | fields))
    return state


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({}, {UP: 6 / 4, Q: 6 / 4}),
        ({"use_rslora": True}, {UP: 6 / 2, Q: 6 / 2}),
        ({"alpha_pattern": {"mlp.up_proj": 2, "j": 9, "k_proj": 9}}, {UP: 2 / 4, Q: 6 / 4}),
    ],
)
def test_a_merge_is_the_weight_and_the_scaled_product_under_the_mask(
    fields: dict[str, Any], scales: dict[str, float], dtype: Any, tmp_path: pathlib.Path
) -> None:
    dense = checkpoint(tmp_path / "pruned", dtype)
    shapes = {name: dense[f"{name}.weight"].shape for name in (UP, Q, "lm_head")}
    factors = adapter(tmp_path / "adapter", shapes, **fields)
    zeros, _ = restore_zeros(tmp_path / "pruned", tmp_path / "adapter", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == dense.keys()
    for weight, x in dense.items():
        name = weight.removesuffix(".weight")
        if name not in shapes:
            assert written[weight].tobytes() == x.tobytes()
            continue
        a, b = (factors[f"base_model.model.{name}.lora_{p}.weight"] for p in "AB")
        product = np.einsum("or,ri->oi", b.astype(np.float64), a.astype(np.float64))
        merged = x.astype(np.float64) + scales.get(name, scales[Q]) * product
        # The head is adapted too, and was not pruned: its own zeros are nobody's.
        wanted = merged if name == "lm_head" else np.where(x == 0, 0, merged)
        assert written[weight].dtype == dtype
        ulp = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(written[weight].astype(np.float64), wanted, ulp, 4e-6)
        if name != "lm_head":
            assert (written[weight][x == 0] == 0).all()
            assert zeros[name].lost == zeros[name].pruned == (x == 0).sum()
    assert sum(z.lost > 0 for z in zeros.values()) == 2
    found = lost_zeros(tmp_path / "pruned", tmp_path / "adapter")
    assert found == zeros and list(found) == list(zeros)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not LORA: merge it with peft"),
        ({"use_dora": True}, "use_dora True is not plain LoRA: merge it with peft"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* is not plain LoRA"),
        ({"bias": "all"}, "bias 'all' is not plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is not plain"),
        ({"alpha_pattern": {"(a+)+": 1}}, "alpha_pattern is no plain list of modules"),
        ({"lora_alpha": "6"}, "lora_alpha '6' is no number"),
    ],
)
def test_other_adapters_are_refused(
    fields: dict[str, Any], says: str, tmp_path: pathlib.Path
) -> None:
    checkpoint(tmp_path / "pruned")
    adapter(tmp_path / "adapter", {UP: (40, 32)}, **fields)
    with pytest.raises(InputError, match=says):
        lost_zeros(tmp_path / "pruned", tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused(tmp_path: pathlib.Path) -> None:
    pruned, directory = tmp_path / "pruned", tmp_path / "adapter"
    checkpoint(pruned)
    for shapes, says in (
        ({UP: (40, 33)}, r"lora_A \[4, 33\] and lora_B \[40, 4\] of .* do not fit .* \[40, 32\]"),
        ({"model.layers.7.mlp.up_proj": (40, 32)}, "layers.7.mlp.up_proj, which is no linear of"),
    ):
        adapter(directory, shapes)
        with pytest.raises(InputError, match=says):
            lost_zeros(pruned, directory)
    half = adapter(directory, {UP: (40, 32)})
    file = directory / "adapter_model.safetensors"
    (first, x), (second, _) = half.items()
    save_file({first: x}, file)
    with pytest.raises(InputError, match="lacks lora_A or lora_B"):
        lost_zeros(pruned, directory)
    save_file(half | {second.replace("lora_B", "lora_embedding_B"): x}, file)
    with pytest.raises(InputError, match=r"tensor .*lora_embedding_B.* is no part of plain LoRA"):
        lost_zeros(pruned, directory)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is damaged"):
        lost_zeros(pruned, directory)
    file.unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors: save the adapter"):
        lost_zeros(pruned, directory)
    checkpoint(directory)
    with pytest.raises(InputError, match="adapter holds a model and an adapter"):
        lost_zeros(pruned, directory)


def test_a_head_that_is_the_embedding_is_not_merged_into(tmp_path: pathlib.Path) -> None:
    checkpoint(tmp_path / "pruned", tie_word_embeddings=True)
    adapter(tmp_path / "adapter", {"lm_head": (tiny.VOCAB, 32)})
    with pytest.raises(InputError, match="lm_head, which the checkpoint shares with its embedding"):
        lost_zeros(tmp_path / "pruned", tmp_path / "adapter")
    adapter(tmp_path / "adapter", {UP: (40, 32)})
    assert lost_zeros(tmp_path / "pruned", tmp_path / "adapter")[UP].lost > 0
