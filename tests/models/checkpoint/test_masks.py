"""Zeros that fine-tuning lost are counted and put back; everything else stays as it is."""

import json
import pathlib
import shutil
import tracemalloc
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models.checkpoint.block_specs import linear_weights
from models.checkpoint.fused import join
from models.checkpoint.masks import Zeros, lost_zeros, restore_zeros
from models.checkpoint.own_code import CODE, own_code
from models.checkpoint.pack import pack
from models.errors import InputError
from reference import families, small, tiny, tiny_tokenizer, torch_models

State = dict[str, np.ndarray]
ONE = {**tiny.GQA, "num_hidden_layers": 1}
UP = "model.layers.0.mlp.up_proj"


def is_linear(name: str) -> bool:
    return name.endswith("proj.weight") or (".fc" in name and name.endswith("weight"))


def pruned_state(config: Mapping[str, Any], dtype: Any = np.float32) -> State:
    """Return random weights, every third entry of the linears zero."""
    state = tiny.state_of(config, tiny.random_model(config))
    for name in filter(is_linear, state):
        state[name] = state[name].copy()
        state[name].flat[::3] = 0
    return {name: x.astype(dtype) for name, x in state.items()}


def tuned_state(pruned: State) -> State:
    """Return weights after a step that filled zeros of `up_proj` alone, and made new ones."""
    state = {name: x.copy() for name, x in pruned.items()}
    state[f"{UP}.weight"][:4] = 1
    state[f"{UP}.weight"][5] = -0.0
    state["model.norm.weight"] = state["model.norm.weight"] + np.asarray(
        1, pruned[f"{UP}.weight"].dtype
    )
    return state


@pytest.fixture
def pruned(tmp_path: pathlib.Path) -> pathlib.Path:
    return tiny.write(tmp_path / "pruned", pruned_state(ONE), ONE)


@pytest.fixture
def tuned(tmp_path: pathlib.Path) -> pathlib.Path:
    return tiny.write(tmp_path / "tuned", tuned_state(pruned_state(ONE)), ONE)


def test_lost_zeros_are_counted_by_linear(pruned: pathlib.Path, tuned: pathlib.Path) -> None:
    zeros = lost_zeros(pruned, tuned)
    before, after = (load_file(d / "model.safetensors") for d in (pruned, tuned))
    assert set(zeros) == {n.removesuffix(".weight") for n in before if is_linear(n)}
    for name, found in zeros.items():
        x, y = before[f"{name}.weight"], after[f"{name}.weight"]
        lost = sum(a == 0 and b != 0 for a, b in zip(x.flat, y.flat, strict=True))
        assert found == Zeros(x.size, int((x == 0).sum()), int((y == 0).sum()), lost)
    assert [name for name, found in zeros.items() if found.lost] == [UP]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_restored_files_differ_in_the_lost_zeros_alone(dtype: Any, tmp_path: pathlib.Path) -> None:
    """Two shards in a type of their own, against zeros of a float32 checkpoint."""
    config = {**ONE, "dtype": np.dtype(dtype).name}
    weights = pruned_state(ONE, dtype)
    pruned = tiny.write(
        tmp_path / "pruned", {n: x.astype(np.float32) for n, x in weights.items()}, ONE
    )
    state = tuned_state(weights)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    tiny_tokenizer.write(tuned)
    names, shards = sorted(state), ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    weight_map = {n: shards[k % 2] for k, n in enumerate(names)}
    for shard in shards:
        own = {n: state[n] for n in names if weight_map[n] == shard}
        save_file(own, tuned / shard, metadata={"format": "pt", "by": "a trainer"})
    (tuned / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tuned / "config.json").write_text(json.dumps(config))
    (tuned / "generation_config.json").write_text("{}")
    (tuned / "code.py").write_text("raise SystemExit")

    zeros, remarks = restore_zeros(pruned, tuned, tmp_path / "out")
    assert not remarks and sum(z.lost for z in zeros.values()) > 0
    kept = {f.name for f in tuned.iterdir()} - {"code.py"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == kept
    for name in kept - set(shards):
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "np") as file:
            assert file.metadata() == {"format": "pt", "by": "a trainer"}
        for name, x in load_file(tmp_path / "out" / shard).items():
            wanted = state[name].copy()
            if is_linear(name):
                wanted[weights[name] == 0] = 0
            assert x.dtype == wanted.dtype and x.tobytes() == wanted.tobytes(), name
    assert not any(z.lost for z in lost_zeros(pruned, tmp_path / "out").values())


@pytest.mark.parametrize("bare", ["pruned", "tuned"])
def test_a_bare_decoder_has_the_same_linears(bare: str, tmp_path: pathlib.Path) -> None:
    """OPT's checkpoints come with and without the prefix of the language model."""
    config = {**tiny.OPT, "num_hidden_layers": 1}
    state = pruned_state(config)
    other = {name: x + np.float32(1) for name, x in state.items()}
    for kind, values in (("pruned", state), ("tuned", other)):
        prefix = "model." if kind == bare else ""
        own = {name.removeprefix(prefix): x for name, x in values.items()}
        tiny.write(tmp_path / kind, own, config)
    zeros, _ = restore_zeros(tmp_path / "pruned", tmp_path / "tuned", tmp_path / "out")
    assert len(zeros) == 6 and all(z.lost == z.pruned > 0 for z in zeros.values())
    written = load_file(tmp_path / "out/model.safetensors")
    for name in state:
        x = written[name.removeprefix("model.") if bare == "tuned" else name]
        wanted = other[name] * (state[name] != 0) if is_linear(name) else other[name]
        np.testing.assert_array_equal(x, wanted)


def test_a_packed_checkpoint_is_compared_and_not_written(
    pruned: pathlib.Path, tuned: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for directory in (pruned, tuned):
        pack(directory, "bitmask")
    assert lost_zeros(pruned / "packed", tuned / "packed") == lost_zeros(pruned, tuned)
    restore_zeros(pruned / "packed", tuned, tmp_path / "out")
    assert not any(z.lost for z in lost_zeros(pruned, tmp_path / "out").values())
    with pytest.raises(InputError, match=r"packed is packed: write it dense first, with launch"):
        restore_zeros(pruned, tuned / "packed", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def changed(tuned: pathlib.Path, **tensors: Any) -> None:
    state = load_file(tuned / "model.safetensors")
    for name, x in tensors.items():
        state.pop(name) if x is None else state.update({name: x})
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})


def test_what_does_not_belong_together_is_refused(
    pruned: pathlib.Path, tuned: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    deeper = tiny.write(tmp_path / "deeper", pruned_state(tiny.GQA), tiny.GQA)
    with pytest.raises(InputError, match=r"deeper holds 2 blocks, the pruned .* names 1: they"):
        lost_zeros(pruned, deeper)
    weight, original = f"{UP}.weight", (tuned / "model.safetensors").read_bytes()
    for tensors, says in (
        ({weight: None}, rf"tuned has no tensor {weight}: give a whole checkpoint"),
        ({weight: np.ones((2, 3), np.float32)}, rf"{weight} has shape \[2, 3\], in the pruned"),
        ({weight: np.ones((40, 32), np.int8)}, "is stored as I8, not as a float"),
    ):
        changed(tuned, **tensors)
        with pytest.raises(InputError, match=says):
            lost_zeros(pruned, tuned)
        (tuned / "model.safetensors").write_bytes(original)
    (tuned / "config.json").write_text(json.dumps(ONE | {"quantization_config": {"bits": 4}}))
    with pytest.raises(InputError, match="quantised"):
        lost_zeros(pruned, tuned)
    (tuned / "config.json").unlink()
    with pytest.raises(InputError, match=r"tuned has no config\.json"):
        lost_zeros(pruned, tuned)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match=r"model\.gguf is a GGUF file: give the Hugging Face"):
        lost_zeros(pruned, tmp_path / "model.gguf")


def test_a_tensor_in_two_shards_is_not_restored(
    pruned: pathlib.Path, tuned: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    names = list(load_file(tuned / "model.safetensors"))
    shutil.copy(tuned / "model.safetensors", tuned / "a.safetensors")
    (tuned / "model.safetensors").rename(tuned / "b.safetensors")
    weight_map = {n: f"{'ab'[k % 2]}.safetensors" for k, n in enumerate(names)}
    (tuned / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert lost_zeros(pruned, tuned)[UP].lost > 0
    with pytest.raises(InputError, match=r"b\.safetensors repeats .* of another shard"):
        restore_zeros(pruned, tuned, tmp_path / "out")


CONFIGS = {
    "llama": tiny.GQA,
    "opt": tiny.OPT,
    "tied": {**tiny.GQA, "tie_word_embeddings": True},
    "phi3": families.FAMILIES["phi3"],
    "mixtral": families.FAMILIES["mixtral"],
    "ragged": small.RAGGED["llama"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_after_training_is_restored(
    name: str, tmp_path: pathlib.Path
) -> None:
    """Every family names the tensors as it likes when it saves; ragged ones need their class."""
    import torch

    config = CONFIGS[name]
    linears = set(linear_weights(config))
    state = tiny.state_of(config, tiny.random_model(config))
    state = join(state, list(state))
    for weight in linears:
        state[weight] = state[weight].copy()
        state[weight].flat[::3] = 0
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    pruned = tiny.write(tmp_path / "pruned", state, config)
    if name == "ragged":
        auto = {"AutoConfig": "PrunedConfig", "AutoModelForCausalLM": "PrunedForCausalLM"}
        auto = {key: f"modeling_pruned.{value}" for key, value in auto.items()}
        (pruned / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
        (pruned / CODE).write_text(own_code(config))
    model = torch_models.load(pruned)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.full_like(weight, 0.5))
    model.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / CODE).unlink(missing_ok=True)  # the hub's copy has none

    zeros, _ = restore_zeros(pruned, tmp_path / "tuned", tmp_path / "out")
    assert {f"{linear}.weight" for linear in zeros} == linears
    assert all(z.lost == z.pruned > 0 for z in zeros.values())
    trained, after = (load_file(tmp_path / d / "model.safetensors") for d in ("tuned", "out"))
    assert after.keys() == trained.keys() and linears <= after.keys()
    for weight, x in after.items():
        mask = state[weight] != 0 if weight in linears else True
        np.testing.assert_array_equal(x, trained[weight] * mask)
    loaded = torch_models.load(tmp_path / "out").state_dict()
    for weight in linears & loaded.keys():
        assert ((loaded[weight] == 0).numpy() == (state[weight] == 0)).all()


def test_one_tensor_is_in_memory_at_a_time(tmp_path: pathlib.Path) -> None:
    config = {**tiny.LLAMA, "num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 256}
    state = pruned_state(config)
    largest, whole = (f(x.nbytes for x in state.values()) for f in (max, sum))
    for kind in ("pruned", "tuned"):
        tiny.write(tmp_path / kind, state, config)
    del state
    restore_zeros(tmp_path / "pruned", tmp_path / "tuned", tmp_path / "first")  # imports
    tracemalloc.start()
    restore_zeros(tmp_path / "pruned", tmp_path / "tuned", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * largest < whole / 4
