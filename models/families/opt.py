"""OPT's configuration and tensor names."""

from collections.abc import Mapping
from typing import Any

from models import opt
from models.arch import Arch
from models.errors import InputError
from models.families.fields import REPAIR, Fields, read_biases, read_widths
from models.families.specs import Family, linear_spec, make_spec
from models.layers import Norm

LINEARS = {
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q": "self_attn.q_proj",
    "o": "self_attn.out_proj",
    "fc1": "fc1",
    "fc2": "fc2",
}


def _arch(config: Mapping[str, Any]) -> Arch:
    f = Fields(config)
    dim, n = f.count("hidden_size"), f.count("num_attention_heads")
    if dim % n:
        raise InputError(
            f"config.json: hidden_size={dim} is not a multiple of num_attention_heads={n}", REPAIR
        )
    # False in OPT-350m alone, which then has no final norm either.
    pre_norm = f.flag("do_layer_norm_before", True)
    stock_biases = tuple(LINEARS) if f.flag("enable_bias", True) else ()
    # Defaults are those of transformers, which leaves fields that equal them out of the file.
    return opt.arch(
        opt.Config(
            head_dim=dim // n,
            act=f.act("activation_function", "relu"),
            pre_norm=pre_norm,
            final_norm=pre_norm and not f.flag("_remove_final_layer_norm", False),
            dim=dim,
            word_dim=f.count("word_embed_proj_dim", dim),
            ffn_dim=f.count("ffn_dim"),
            vocab=f.count("vocab_size"),
            positions=f.count("max_position_embeddings", 2048),
            affine=f.flag("layer_norm_elementwise_affine", True),
            tied=f.flag("tie_word_embeddings", True),
            biases=read_biases(f, LINEARS, stock_biases),
            widths=read_widths(f),
        )
    )


def _norm(c: opt.Config, name: str) -> Norm:
    if not c.affine:
        return Norm()
    return Norm(
        make_spec(f"{name}.weight", (c.dim,), "ones"), make_spec(f"{name}.bias", (c.dim,), "zeros")
    )


def _non_block(c: opt.Config) -> opt.NonBlockParams:
    # OPT-350M embeds in 512 channels and projects to 1,024.
    p, projected = "model.decoder.", c.word_dim != c.dim
    return opt.NonBlockParams(
        embed=make_spec(p + "embed_tokens.weight", (c.vocab, c.word_dim)),
        positions=make_spec(
            p + "embed_positions.weight", (c.positions + opt.POSITION_OFFSET, c.dim)
        ),
        norm=_norm(c, p + "final_layer_norm") if c.final_norm else None,
        project_in=linear_spec(p + "project_in", c.dim, c.word_dim, False) if projected else None,
        project_out=linear_spec(p + "project_out", c.word_dim, c.dim, False) if projected else None,
        head=None if c.tied else linear_spec("lm_head", c.vocab, c.word_dim, False),
    )


def _block(c: opt.Config, i: int) -> opt.Block:
    p = f"model.decoder.layers.{i}."
    heads, neurons = c.widths[i] if c.widths else (c.dim // c.head_dim, c.ffn_dim)
    n = heads * c.head_dim
    shapes = {
        "k": (n, c.dim),
        "v": (n, c.dim),
        "q": (n, c.dim),
        "o": (c.dim, n),
        "fc1": (neurons, c.dim),
        "fc2": (c.dim, neurons),
    }
    linears = {
        slot: linear_spec(p + name, *shapes[slot], slot in c.biases)
        for slot, name in LINEARS.items()
    }
    return opt.Block(
        attn_norm=_norm(c, p + "self_attn_layer_norm"),
        # OPT gives this norm of each block the same name as the model's last one.
        mlp_norm=_norm(c, p + "final_layer_norm"),
        **linears,
    )


def _narrow(c: opt.Config, dim: int) -> dict[str, Any]:
    """Return the fields of a model with another hidden size, which its heads make up."""
    return {
        "hidden_size": dim,
        "word_embed_proj_dim": dim,
        "num_attention_heads": dim // c.head_dim,
    }


OPT = Family(
    config_class="OPTConfig",
    model_class="OPTForCausalLM",
    linears=LINEARS,
    arch=_arch,
    non_block=_non_block,
    block=_block,
    bias_flags={"enable_bias": tuple(LINEARS)},
    neurons="ffn_dim",
    remote="opt",
    narrow=_narrow,
)
