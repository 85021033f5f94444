"""GGUF files give back the model that was written, with its names, rotary settings and values."""

import pathlib
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf
from gguf.quants import dequantize, quantize

from models.checkpoint.gguf import open_gguf
from models.checkpoint.gguf_file import lazy, read_gguf
from models.checkpoint.reader import open_checkpoint
from models.errors import InputError

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, BLOCKS = 4, 2, 16, 96, 40, 2
DIM = 64
Q = gguf.GGMLQuantizationType
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, DIM),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, DIM),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, DIM),
    "self_attn.o_proj": (DIM, HEADS * HEAD_DIM),
    "mlp.gate_proj": (HIDDEN, DIM),
    "mlp.up_proj": (HIDDEN, DIM),
    "mlp.down_proj": (DIM, HIDDEN),
    "input_layernorm": (DIM,),
    "post_attention_layernorm": (DIM,),
}


def random_state(tied: bool = False, biases: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Return a LLaMA checkpoint under Hugging Face names."""
    rng = np.random.default_rng(0)
    shapes = {f"model.layers.{i}.{n}.weight": s for i in range(BLOCKS) for n, s in SHAPES.items()}
    shapes |= {f"model.layers.{i}.{n}.bias": SHAPES[n][:1] for i in range(BLOCKS) for n in biases}
    shapes |= {"model.embed_tokens.weight": (VOCAB, DIM), "model.norm.weight": (DIM,)}
    shapes |= {} if tied else {"lm_head.weight": (VOCAB, DIM)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    non_block = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    module, kind = name.rsplit(".", 1)
    if module in non_block:
        return f"{non_block[module]}.{kind}"
    _, _, block, part = module.split(".", 3)
    return f"blk.{block}.{NAMES[part]}.{kind}"


def permuted(name: str, value: np.ndarray) -> np.ndarray:
    """Rows as llama.cpp's converter orders them: the two halves of each head interleaved."""
    heads = HEADS if "q_proj" in name else KV_HEADS
    if "q_proj" not in name and "k_proj" not in name:
        return value
    return (
        value.reshape(heads, 2, HEAD_DIM // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    )


FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "block_count": BLOCKS,
    "context_length": 128,
    "embedding_length": DIM,
    "feed_forward_length": HIDDEN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50000.0,
    "rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
EMBEDDING = {"model.embed_tokens.weight": np.zeros((VOCAB, DIM), np.float32)}


def write(
    path: pathlib.Path,
    state: dict[str, np.ndarray],
    kind: Any = Q.F32,
    arch: str = "llama",
    **changes: Any,
) -> pathlib.Path:
    """Write a GGUF file, matrices as `kind`; `changes` replace FIELDS, None removes one."""
    writer = gguf.GGUFWriter(path, arch)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in (FIELDS | changes).items():
        if value is not None:
            add[type(value)](
                key if key.startswith(("tokenizer.", "split.")) else f"{arch}.{key}", value
            )
    for name, value in state.items():
        value = permuted(name, value) if arch == "llama" else value
        stored = kind if value.ndim == 2 else Q.F32
        writer.add_tensor(
            name if name.startswith(("rope_", "blk.")) else gguf_name(name),
            quantize(value, stored),
            raw_dtype=stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0], ids=lambda k: k.name)
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_written(tmp_path: pathlib.Path, kind: Any, tied: bool) -> None:
    state = random_state(tied)
    config, tensors = open_gguf(write(tmp_path / "m.gguf", state, kind))
    assert config["tie_word_embeddings"] is tied
    assert dict(tensors.shapes) == {n: v.shape for n, v in state.items()}
    plain = {Q.F32: "float32", Q.F16: "float16", Q.BF16: "bfloat16"}
    for name, value in state.items():
        got = tensors.read(name)
        # Rows are quantised one by one, so quantising them in the other order changes nothing.
        wanted = dequantize(quantize(value, kind), kind) if value.ndim == 2 else value
        assert str(got.dtype) == (plain.get(kind, "float32") if value.ndim == 2 else "float32")
        np.testing.assert_array_equal(got.astype(np.float32), wanted, err_msg=name)


def test_the_configuration_is_that_of_the_metadata(tmp_path: pathlib.Path) -> None:
    config, _ = open_gguf(write(tmp_path / "m.gguf", random_state()))
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


def test_biases_are_permuted_with_their_rows(tmp_path: pathlib.Path) -> None:
    linears = tuple(n for n in NAMES if n.endswith("_proj"))
    state = random_state(biases=linears)
    config, tensors = open_gguf(write(tmp_path / "m.gguf", state))
    assert config["attention_bias"] and config["mlp_bias"]
    for name, value in state.items():
        np.testing.assert_array_equal(tensors.read(name), value, err_msg=name)


def test_qwen2_is_not_permuted(tmp_path: pathlib.Path) -> None:
    state = random_state(biases=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    config, tensors = open_gguf(write(tmp_path / "m.gguf", state, arch="qwen2"))
    assert config["model_type"] == "qwen2" and config["architectures"] == ["Qwen2ForCausalLM"]
    assert "attention_bias" not in config
    for name, value in state.items():
        np.testing.assert_array_equal(tensors.read(name), value, err_msg=name)


def test_rotation_of_halves_is_that_of_neighbours_in_the_file(tmp_path: pathlib.Path) -> None:
    """Compare query-key products at two positions.

    llama.cpp's rotation of the file's rows equals transformers' rotation of the rows as read.
    """
    path = write(tmp_path / "m.gguf", random_state())
    _, tensors = open_gguf(path)
    angles = 50000.0 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    file, x = read_gguf(path), np.random.default_rng(1).standard_normal(DIM)

    def rotated(z: np.ndarray, position: int) -> np.ndarray:
        return z * np.exp(1j * position * angles)

    def neighbours(name: str, position: int) -> np.ndarray:
        h = (lazy(path, name, file.tensors[name]).load() @ x).reshape(-1, HEAD_DIM // 2, 2)
        return rotated(h[..., 0] + 1j * h[..., 1], position)

    def halves(name: str, position: int) -> np.ndarray:
        h = (tensors.read(name) @ x).reshape(-1, 2, HEAD_DIM // 2)
        return rotated(h[:, 0] + 1j * h[:, 1], position)

    theirs = neighbours("blk.0.attn_q.weight", 7)[::2] * neighbours("blk.0.attn_k.weight", 3).conj()
    ours = (
        halves("model.layers.0.self_attn.q_proj.weight", 7)[::2]
        * halves("model.layers.0.self_attn.k_proj.weight", 3).conj()
    )
    np.testing.assert_allclose(ours.real.sum(-1), theirs.real.sum(-1), rtol=1e-5)


@pytest.mark.parametrize("name", ["attention.key_length", "rope.dimension_count"])
def test_a_head_width_that_does_not_divide_the_hidden_size_is_kept(
    tmp_path: pathlib.Path, name: str
) -> None:
    changes = {"attention.head_count": 2, "rope.dimension_count": None, name: 16}
    config, _ = open_gguf(write(tmp_path / "m.gguf", EMBEDDING, **changes))
    assert (config["num_attention_heads"], config["head_dim"]) == (2, 16)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rope.freq_base": None}, {"rope_theta": 10000.0, "rope_type": "default"}),
        (
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
            {"rope_theta": 50000.0, "rope_type": "default"},
        ),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_theta": 50000.0, "rope_type": "linear", "factor": 4.0},
        ),
        ({"rope.scale_linear": 2.5}, {"rope_theta": 50000.0, "rope_type": "linear", "factor": 2.5}),
        ({"rope.scale_linear": 1.0}, {"rope_theta": 50000.0, "rope_type": "default"}),
    ],
)
def test_rotary_metadata_becomes_rope_parameters(
    tmp_path: pathlib.Path, changes: dict[str, Any], wanted: dict[str, Any]
) -> None:
    config, _ = open_gguf(write(tmp_path / "m.gguf", EMBEDDING, **changes))
    assert config["rope_parameters"] == wanted


def llama3_factors(theta: float, dim: int, scaling: dict[str, float]) -> np.ndarray:
    """Return llama.cpp's factors: transformers' unscaled frequencies over the scaled ones."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        head_dim=dim,
        max_position_embeddings=2**17,
        rope_parameters={"rope_theta": theta, "rope_type": "llama3"} | scaling,
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (theta ** -(np.arange(0, dim, 2) / dim) / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(("high", "length"), [(4.0, 8192), (2.5, 4096)])
def test_llama3_scaling_is_recovered(
    tmp_path: pathlib.Path, dim: int, factor: float, high: float, length: int
) -> None:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    state = EMBEDDING | {"rope_freqs.weight": llama3_factors(5e5, dim, scaling)}
    config, tensors = open_gguf(
        write(tmp_path / "m.gguf", state, **{"rope.freq_base": 5e5, "rope.dimension_count": dim})
    )
    assert config["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "llama3"} | scaling
    assert list(tensors.shapes) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    "factors",
    [
        np.linspace(1, 8, 8),
        np.array([1, 1, 1.1, 3, 7.9, 8, 8, 8]),
        np.array([1, 1, 1, 1, 8, 8, 8, 8]),
        np.linspace(8, 1, 8),
        np.full(8, 0.5),
        np.ones(4),
        np.full(8, np.nan),
    ],
)
def test_factors_that_are_not_llama3s_are_refused(
    tmp_path: pathlib.Path, factors: np.ndarray
) -> None:
    state = EMBEDDING | {"rope_freqs.weight": factors.astype(np.float32)}
    with pytest.raises(
        InputError, match=r"rope_freqs\.weight is not LLaMA 3's rotary scaling: use the original"
    ):
        open_gguf(write(tmp_path / "m.gguf", state))


def test_factors_of_one_scale_nothing(tmp_path: pathlib.Path) -> None:
    state = EMBEDDING | {"rope_freqs.weight": np.ones(8, np.float32)}
    config, _ = open_gguf(write(tmp_path / "m.gguf", state))
    assert config["rope_parameters"] == {"rope_theta": 50000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_count": None}, "metadata llama.block_count is None"),
        ({"block_count": 0}, "llama.block_count is 0, not a positive number"),
        ({"attention.head_count": [4, 4]}, r"llama.attention.head_count is \[4, 4\], not one int"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is None"),
        ({"attention.key_length": 32}, "differ in width"),
        (
            {"rope.scaling.type": "xrope", "rope.scaling.factor": 4.0},
            "rotary scaling 'xrope' is not read",
        ),
        ({"split.count": 3}, "one of 3 shards: join them first"),
    ],
)
def test_wrong_metadata_is_refused(
    tmp_path: pathlib.Path, changes: dict[str, Any], says: str
) -> None:
    path = write(tmp_path / "m.gguf", EMBEDDING, **changes)
    with pytest.raises(InputError, match=says):
        open_gguf(path)


def test_other_architectures_and_tensors_are_refused(tmp_path: pathlib.Path) -> None:
    known = (
        "llama, qwen2, qwen3, granite, smollm3, olmo2, phi2, phi3, gemma, gemma2, gemma3, deci: use"
    )
    with pytest.raises(
        InputError, match=f"architecture 'bloom' is not read from GGUF, only {known}"
    ):
        open_gguf(write(tmp_path / "bloom.gguf", EMBEDDING, arch="bloom"))
    for name in ("blk.0.ffn_gate_exps.weight", "blk.0.attn_q_norm.weight", "blk.x.attn_q.weight"):
        with pytest.raises(InputError, match=f"tensor {name} is not part of a plain llama model"):
            open_gguf(write(tmp_path / "m.gguf", EMBEDDING | {name: np.zeros((4, 4), np.float32)}))
    with pytest.raises(InputError, match=r"holds no token_embd\.weight"):
        open_gguf(write(tmp_path / "none.gguf", {"model.norm.weight": np.ones(4, np.float32)}))


def test_rows_that_are_not_those_of_the_heads_are_refused(tmp_path: pathlib.Path) -> None:
    state = EMBEDDING | {"blk.0.attn_k.weight": np.zeros((24, DIM), np.float32)}
    with pytest.raises(
        InputError, match=r"attn_k\.weight has 24 rows, which are no whole heads of 16"
    ):
        open_gguf(write(tmp_path / "m.gguf", state))


def test_the_missing_package_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf", EMBEDDING)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="needs the gguf package: pip install gguf"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("block_count", 2**31, "not a positive number of 32 bits"),
        ("embedding_length", 2**32 - 1, "not a positive number of 32 bits"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "not a positive number"),
        ("attention.layer_norm_rms_epsilon", float("inf"), "not a positive number"),
        ("rope.freq_base", -1.0, "not a positive number"),
        ("attention.head_count", True, "not one int"),
        ("context_length", "x" * 5000, "not one int"),
    ],
)
def test_odd_metadata_is_refused(key: str, value: Any, says: str, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "m.gguf", random_state(), **{key: value})
    with pytest.raises(InputError, match=says) as caught:
        open_gguf(path)
    assert len(str(caught.value)) < 400


def test_more_blocks_than_the_file_has_are_refused(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "m.gguf", random_state(), block_count=9000)
    with pytest.raises(InputError, match="num_hidden_layers=9000, but the weights hold 2 blocks"):
        open_checkpoint(path)
