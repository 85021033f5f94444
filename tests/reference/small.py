"""Small random models (LLaMA, with grouped-query attention, OPT) and masks of what is removed."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Arch, Block, Model, embed, linear_of
from models.experts import Routed
from models.families import hf
from pruning.types import Outcome
from reference import wanda

VOCAB = 31
_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "llama-gqa": _LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "opt": {
        "model_type": "opt",
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    },
}
FAMILIES = tuple(CONFIGS)
_SLIDING = {"head_dim": 4, "sliding_window": 5, "query_pre_attn_scalar": 6}
# Families whose blocks differ from those in something that a method may see.
MORE_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "mistral": _LLAMA | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "qwen3": _LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 6},
    "granite": _LLAMA | {"model_type": "granite", "residual_multiplier": 0.5},
    "smollm3": _LLAMA | {"model_type": "smollm3", "num_key_value_heads": 2},
    "olmo2": _LLAMA | {"model_type": "olmo2", "num_key_value_heads": 2},
    "phi": _LLAMA | {"model_type": "phi"},
    "phi3": _LLAMA | {"model_type": "phi3", "num_key_value_heads": 2},
    "gemma": _LLAMA | {"model_type": "gemma", "num_key_value_heads": 2, "head_dim": 6},
    "gemma2": _LLAMA | {"model_type": "gemma2", "num_key_value_heads": 2} | _SLIDING,
    "gemma3": _LLAMA | {"model_type": "gemma3_text", "num_key_value_heads": 2} | _SLIDING,
    "mixtral": _LLAMA | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 3},
    "qwen3_moe": _LLAMA
    | {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "olmoe": _LLAMA | {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
}
EVERY_FAMILY = (*CONFIGS, *MORE_CONFIGS)
# Models that were pruned before: blocks of different widths, the first one not the widest.
RAGGED: Mapping[str, Mapping[str, Any]] = {
    "llama": CONFIGS["llama"]
    | {
        "model_type": "topiary_llama",
        "widths": {"heads": [2, 4, 3], "neurons": [12, 24, 18]},
        "biases": [],
    },
    "llama-gqa": CONFIGS["llama-gqa"]
    | {
        "model_type": "topiary_llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "widths": {"heads": [2, 4, 3], "neurons": [12, 24, 18]},
        "biases": ["mlp.down_proj"],
    },
    "opt": CONFIGS["opt"]
    | {
        "model_type": "topiary_opt",
        "widths": {"heads": [2, 4, 3], "neurons": [12, 24, 18]},
        "biases": ["self_attn.out_proj", "fc2"],
    },
}


@functools.cache
def model(family: str, seed: int = 0, dtype: str = "float32", ragged: bool = False) -> Model:
    """Return the random model, drawn on the host.

    Norms and biases are random too, so that forgetting one of them shows.
    """
    arch, non_block, blocks = hf.specs(
        RAGGED[family] if ragged else {**CONFIGS, **MORE_CONFIGS}[family]
    )
    rng = np.random.default_rng(seed)

    def draw(spec: hf.Spec) -> jax.Array:
        mean, std = {"normal": (0, 0.3), "ones": (1, 0.1), "zeros": (0, 0.1)}[spec.init]
        return jnp.asarray(rng.normal(mean, std, spec.shape), dtype)

    return Model(arch, *jax.tree.map(draw, (non_block, blocks), is_leaf=hf.is_spec))


@functools.cache
def _taps(arch: Arch) -> Callable[..., Any]:
    return jax.jit(arch.block)


def run_block(model: Model, block: Block, x: jax.Array) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Return a block's output [b t d], and its taps on the host in float64, without experts'."""
    y, taps = _taps(model.arch)(block, x)
    whole = {name: tap for name, tap in taps.items() if not isinstance(tap, Routed)}
    return y, {name: np.asarray(tap).astype(np.float64) for name, tap in whole.items()}


def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Return the model's logits [b t vocab]."""
    x = embed(model.arch, model.non_block, tokens)
    for block in model.blocks:
        x, _ = _taps(model.arch)(block, x)
    return np.asarray(model.arch.head(model.non_block, x))


def tokens(samples: int = 6, length: int = 12, seed: int = 0) -> np.ndarray:
    """Return random calibration windows, int32 [samples length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (samples, length), dtype=np.int32)


def weight(block: Block, slot: str) -> np.ndarray:
    """Return a linear's matrix [out in] on the host, in float64."""
    return np.asarray(linear_of(block, slot).w).astype(np.float64)


def zeros(model: Model) -> list[dict[str, np.ndarray]]:
    """Return by block {slot: bool [out in]}, True where a prunable linear is zero."""
    return [
        {s.name: weight(block, s.name) == 0 for s in model.arch.slots_of(block)}
        for block in model.blocks
    ]


def same(a: Any, b: Any) -> bool:
    """Return whether two trees of arrays have the same structure, types and bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs
    )


def kept(outcome: Outcome, block: int, slot: str, units: int) -> np.ndarray:
    """Return the keep mask, bool [units], of a linear's rows or columns by the outcome."""
    removed = outcome.removed[block][slot]
    keep = np.ones(units, bool)
    keep[list(removed.rows or removed.columns)] = False
    return keep


def without(block: Block, removed: Mapping[str, np.ndarray]) -> Block:
    """Return the block with zeros where {slot: bool [out in]} says that entries are removed."""
    zeroed = {name: jnp.where(mask, 0, getattr(block, name).w) for name, mask in removed.items()}
    return block.replace(**{name: getattr(block, name).replace(w=w) for name, w in zeroed.items()})


def removed_by_wanda(
    m: Model,
    block: Block,
    taps: Mapping[str, np.ndarray],
    fractions: Mapping[str, Any],
    pattern: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Return Wanda's masks of a block from its dense taps: {slot: bool [out in]}, True is removed.

    Each row loses its fraction () or [out], or n of every m.
    """
    removed = {}
    for slot in m.arch.slots:
        w = weight(block, slot.name)
        score = wanda.score(w, wanda.scaler_row(taps[slot.reads]))
        counts = (np.broadcast_to(fractions[slot.name], len(w)) * w.shape[1]).astype(int)
        removed[slot.name] = (
            wanda.removed_n_of_m(score, *pattern)
            if pattern
            else wanda.removed_per_row(score, counts)
        )
    return removed
