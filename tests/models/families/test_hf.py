"""Configurations: architectures, names and shapes; every error is one line."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from models.arch import Block, Model, NonBlockParams, logits
from models.checkpoint.fused import stored_shapes
from models.checkpoint.reader import abstract
from models.errors import InputError
from models.families import hf
from models.published import MODELS
from models.rotary import Rope
from reference import tiny


def spec_leaves(config: dict[str, Any]) -> list[hf.Spec]:
    return jax.tree.leaves(hf.specs(config)[1:], is_leaf=hf.is_spec)


# Mixtures take longest to build.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if "x" in n or "A3B" in n else n for n in MODELS],
)
def test_published_models_have_their_parameters_and_logits(name: str) -> None:
    """At no cost: shapes alone, without a weight."""
    config, parameters = MODELS[name]
    model = abstract(*hf.specs(config), jnp.bfloat16)
    assert (
        sum(math.prod(x.shape) for x in jax.tree.leaves((model.non_block, model.blocks)))
        == parameters
    )

    def run(non_block: NonBlockParams, blocks: tuple[Block, ...], tokens: jax.Array) -> jax.Array:
        return logits(Model(model.arch, non_block, blocks), tokens)

    out = jax.eval_shape(
        run, model.non_block, model.blocks, jax.ShapeDtypeStruct((1, 16), jnp.int32)
    )
    assert (out.shape, out.dtype) == ((1, 16, config["vocab_size"]), jnp.float32)


def with_joined_experts(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes as transformers 5 holds them: all experts of a block in two tensors."""
    joined: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        name = name.replace("block_sparse_moe", "mlp")
        module, _, part = name.partition(".experts.")
        if not part:
            joined[name] = shape
        elif part.endswith(("w1.weight", "gate_proj.weight")):
            key = f"{module}.experts.gate_up_proj"
            count, rows, columns = joined.get(key, (0, 2 * shape[0], shape[1]))
            joined[key] = (count + 1, rows, columns)
        elif part.endswith(("w2.weight", "down_proj.weight")):
            key = f"{module}.experts.down_proj"
            joined[key] = (joined.get(key, (0,))[0] + 1, *shape)
    return joined


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**MODELS[name].config, "num_hidden_layers": 2}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    ours = stored_shapes({s.name: s.shape for s in spec_leaves(config)})
    assert with_joined_experts(ours) == {n: tuple(p.shape) for n, p in theirs.named_parameters()}


def test_tensors_are_initialised_by_their_kind() -> None:
    kinds = {s.name: s.init for s in spec_leaves(tiny.OPT) + spec_leaves(tiny.BIASED)}
    for name, kind in kinds.items():
        norm, bias = "norm" in name, name.endswith(".bias")
        assert kind == ("zeros" if bias else "ones" if norm else "normal"), name


def test_equal_configurations_share_an_architecture_and_so_their_compilations() -> None:
    arch = hf.specs(tiny.GQA)[0]
    assert (
        hf.specs(
            {
                **tiny.GQA,
                "num_key_value_heads": 2,
                "rope_theta": 10000,
                "torch_dtype": "float16",
                "use_cache": True,
            }
        )[0]
        is arch
    )
    assert hf.specs(tiny.LLAMA)[0] is not arch
    assert hash(arch) == hash(hf.specs(dict(tiny.GQA))[0])


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 5}, (None, None, None)),
        ({"model_type": "mistral"}, (4096, 4096, 4096)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None, None)),
        ({"model_type": "mistral", "sliding_window": 5, "max_window_layers": 1}, (5, 5, 5)),
        ({"model_type": "qwen2", "sliding_window": 5}, (None, None, None)),
        (
            {"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True},
            (None, None, None),
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 5,
                "use_sliding_window": True,
                "max_window_layers": 0,
            },
            (5, 5, 5),
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 5,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            (None, None, 5),
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            (None, 4096, 4096),
        ),
    ],
)
def test_sliding_windows_follow_the_configuration(
    change: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    """As transformers' configuration classes fill in what a file leaves out."""
    arch, _, blocks = hf.specs({**tiny.GQA, "num_hidden_layers": 3, **change})
    assert arch.config.windows == windows == tuple(b.window for b in blocks)


def test_rotary_settings_are_read_in_both_spellings() -> None:
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 32,
    }
    expected = Rope(500.0, "llama3", 8.0, 32, 2.0, 5.0)
    for config in (
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **llama3}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **llama3}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "llama3", **llama3}},
        {
            "rope_theta": 1.0,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": 500, "rope_type": "llama3", **llama3},
        },
    ):
        assert hf.specs({**tiny.GQA, **config})[0].config.rope == expected
    assert hf.specs(tiny.GQA)[0].config.rope == Rope(max_positions=64)
    assert hf.specs({**tiny.GQA, "rope_scaling": {"type": "dynamic", "factor": 2.0}})[
        0
    ].config.rope == Rope(10000.0, "dynamic", 2.0, 64)


def test_rotary_settings_that_disagree_are_refused() -> None:
    """transformers 4 would read one of them and transformers 5 the other."""
    linear = {"rope_type": "linear", "factor": 2.0}
    agreed = {
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_theta": 500.0, **linear},
    }
    assert hf.specs({**tiny.GQA, **agreed})[0].config.rope == Rope(500.0, "linear", 2.0, 64)
    for change in (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_theta": 1000.0},
    ):
        with pytest.raises(InputError, match="rope_parameters and rope_scaling disagree"):
            hf.specs({**tiny.GQA, **agreed, **change})


def test_linears_have_their_checkpoint_names() -> None:
    blocks = {k: hf.specs(c)[2][1] for k, c in tiny.FAMILIES.items()}
    assert hf.linear_name(blocks["llama"], "up") == "model.layers.1.mlp.up_proj"
    assert hf.linear_name(blocks["opt"], "o") == "model.decoder.layers.1.self_attn.out_proj"


WIDTHS = {"heads": [1, 1], "neurons": [1, 1]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model_type": None}, "model_type None is not supported"),
    ({"model_type": "gpt2"}, "gemma, gemma2, gemma3_text, granite, llama"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": 32.0}, "hidden_size"),
    ({"vocab_size": True}, "vocab_size"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    (
        {"num_attention_heads": 5, "num_key_value_heads": 5},
        "hidden_size=32 is not a multiple of num_attention_heads=5",
    ),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"rms_norm_eps": 1e300}, "rms_norm_eps"),
    ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"hidden_size": 2**31}, "hidden_size must be an integer from 1 to 2147483647"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers must be an integer from 1 to 10000"),
    ({"model_type": "topiary_llama", "widths": WIDTHS, "biases": [[1]]}, "biases must be a list"),
    ({"model_type": "topiary_llama", "widths": {"heads": [True]}, "biases": []}, "widths must"),
    ({"hidden_act": "swiglu"}, "hidden_act='swiglu' is not supported"),
    ({"rope_scaling": {"rope_type": False}}, "rope type False is not supported"),
    ({"rope_scaling": {"rope_type": None, "type": "linear"}}, "rope type None is not supported"),
    ({"rope_parameters": {"type": ""}}, "rope type '' is not supported"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope type 'su'"),
    ({"rope_scaling": {"rope_type": "yarn", "rope_theta": 1.0}}, "yarn needs a rope_theta"),
    ({"model_type": "smollm3", "no_rope_layers": ["0", "1"]}, "no_rope_layers must be a list"),
    ({"rope_parameters": {"rope_type": "ntk"}}, "default, linear, dynamic, llama3, yarn"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor must be a list of 4 numbers"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
    ({"rope_parameters": ["linear"]}, "rope_parameters must be an object"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
    (
        {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        "low_freq_factor=4.0",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "2"},
        "max_window_layers",
    ),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
        "layer_types",
    ),
    (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "layer_types": ["full_attention", "chunked_attention"],
        },
        "layer_types",
    ),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": "full_attention"},
        "layer_types",
    ),
    ({**tiny.OPT, "num_attention_heads": 5}, "hidden_size=32"),
    ({**tiny.OPT, "ffn_dim": None}, "ffn_dim"),
    ({**tiny.OPT, "word_embed_proj_dim": "16"}, "word_embed_proj_dim"),
    ({**tiny.OPT, "activation_function": "tanhshrink"}, "activation_function"),
    ({**tiny.OPT, "do_layer_norm_before": 1}, "do_layer_norm_before"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says for _, says in WRONG])
def test_a_wrong_configuration_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        hf.specs({**tiny.GQA, **change})
    message = str(caught.value)
    assert message.startswith("config.json: ") and says in message and "\n" not in message, message
