"""Layers against float64 NumPy, rotary positions and activations also against transformers."""

import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.attention
from models.attention import AttentionSettings, attention, chunked_attention, fused_attention
from models.layers import ACTIVATIONS, Linear, Norm, layer_norm, linear, rms_norm, split_heads
from models.rotary import Rope, rotate

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def close(got: jax.Array, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear_equals_numpy(shape: tuple[int, ...]) -> None:
    x, w, b = normal(*shape), normal(7, 5), normal(7)
    close(linear(Linear(w), x), x.astype(float) @ w.T)
    close(linear(Linear(w, b), x), x.astype(float) @ w.T + b)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norms_equal_numpy(eps: float) -> None:
    x, scale, bias = 2 + normal(2, 3, 16), normal(16), normal(16)
    wide = x.astype(float)
    close(
        rms_norm(Norm(scale), x, eps),
        wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * scale,
    )
    plain = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + eps)
    close(layer_norm(Norm(), x, eps), plain)
    close(layer_norm(Norm(scale), x, eps), plain * scale)
    close(layer_norm(Norm(scale, bias), x, eps), plain * scale + bias)


def test_norms_of_bfloat16_are_computed_in_float32() -> None:
    """The result is the nearest bfloat16 to the exact value; bfloat16 arithmetic would miss it."""
    x = jnp.asarray(normal(64, 128), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    for got, expected in (
        (
            rms_norm(Norm(jnp.ones(128, jnp.bfloat16)), x, 1e-6),
            wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6),
        ),
        (layer_norm(Norm(), x), centred / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)),
    ):
        assert got.dtype == jnp.bfloat16
        assert np.mean(np.asarray(got) == expected.astype(jnp.bfloat16)) > 0.99


EXACT = {
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_pytorch_tanh": lambda x: (
        x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_numpy(name: str) -> None:
    x = np.linspace(-6, 6, 49, dtype=np.float32)
    close(ACTIVATIONS[name](x), np.array([EXACT[name](float(v)) for v in x]))


def test_activations_are_those_of_transformers_by_name() -> None:
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 49, dtype=np.float32)
    for name, activation in ACTIVATIONS.items():
        close(activation(x), ACT2FN[name](torch.from_numpy(x)).numpy())


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """Attend over the last `window` positions, one query at a time, in float64."""
    out = np.zeros(q.shape)
    shared = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        scores = (
            k[b, first : t + 1, n // shared].astype(float) @ q[b, t, n] / math.sqrt(q.shape[-1])
        )
        p = np.exp(scores - scores.max())
        out[b, t, n] = p / p.sum() @ v[b, first : t + 1, n // shared]
    return out


@pytest.mark.parametrize(
    ("window", "kv_heads"), [(None, 4), (None, 2), (1, 2), (3, 4), (3, 1), (9, 2), (20, 2)]
)
def test_attention_equals_numpy(window: int | None, kv_heads: int) -> None:
    q, k, v = normal(2, 9, 4, 8), normal(2, 9, kv_heads, 8), normal(2, 9, kv_heads, 8)
    close(attention(q, k, v, AttentionSettings(window)), plain_attention(q, k, v, window))


@pytest.mark.parametrize(("fit", "parts"), [(0, 6), (1, 6), (5, 2)])
@pytest.mark.parametrize("settings", [AttentionSettings(), AttentionSettings(70, 0.3, 5.0)])
def test_few_heads_at_a_time_give_what_all_at_once_give(
    settings: AttentionSettings, fit: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two windows with three key-value heads `fit` may attend at once; parts are equal."""
    inputs = normal(2, 150, 6, 8), normal(2, 150, 3, 8), normal(2, 150, 3, 8)
    above = normal(2, 150, 6, 8)

    def with_gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, back = jax.vjp(lambda *x: attention(*x, settings), q, k, v)
        return out, *back(above)

    together = jax.jit(with_gradients)(*inputs)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    # Two query heads, and 128 queries over 150 keys, have these bytes.
    monkeypatch.setattr(models.attention, "CACHED_BYTES", fit * 4 * 2 * 128 * 150)
    program = jax.jit(lambda *x: with_gradients(*x))  # a new function, so a new program
    assert f"length={parts}" in str(program.trace(*inputs).jaxpr)
    for few, expected in zip(program(*inputs), together, strict=True):
        np.testing.assert_allclose(few, expected, atol=1e-5)


def test_attention_does_not_see_what_comes_after() -> None:
    q, k, v = normal(2, 9, 4, 8), normal(2, 9, 4, 8), normal(2, 9, 4, 8)
    whole = attention(q, k, v, AttentionSettings())
    k[:, 4:], v[:, 4:] = 7.0, 7.0
    changed = attention(q, k, v, AttentionSettings())
    np.testing.assert_array_equal(changed[:, :4], whole[:, :4])
    assert (np.abs(changed[:, 4:] - whole[:, 4:]) > 0.1).any((0, 2, 3)).all()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("window", "kv_heads"), [(None, 4), (None, 2), (1, 2), (3, 1), (20, 2)])
def test_fused_attention_is_asked_for_the_same(
    window: int | None, kv_heads: int, scale: float | None
) -> None:
    """By the implementation that runs on a CPU; cuDNN's takes the same words."""
    q, k, v = (jnp.asarray(normal(2, 9, heads, 8)) for heads in (4, kv_heads, kv_heads))
    settings = AttentionSettings(window, scale)
    want = chunked_attention(q, k, v, settings)
    close(fused_attention(q, k, v, settings, "xla"), np.asarray(want, np.float64))
    with pytest.raises(NotImplementedError):
        fused_attention(q, k, v, settings._replace(cap=5.0), "xla")


def lowered(platform: str, settings: AttentionSettings) -> str:
    """Return the program of attention for a platform that need not be there."""
    x = jax.ShapeDtypeStruct((2, 16, 4, 8), jnp.bfloat16)
    traced = jax.jit(lambda q, k, v: attention(q, k, v, settings)).trace(x, x, x)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_attention_is_fused_on_the_platforms_of_the_table_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lowered("cuda", AttentionSettings()) == lowered("cpu", AttentionSettings())  # no GPU
    asked: list[Any] = []
    gpus = [types.SimpleNamespace(compute_capability="9.0")]
    monkeypatch.setattr(jax, "local_devices", lambda backend: gpus)

    def kernel(q: jax.Array, *_: jax.Array, implementation: str, **options: Any) -> jax.Array:
        """As cuDNN's, with an operation that nothing else has."""
        asked.append((implementation, options["is_causal"]))
        return jnp.tanh(q)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    texts = {
        platform: lowered(platform, AttentionSettings()) for platform in ("cpu", "cuda", "tpu")
    }
    fused = {platform for platform, text in texts.items() if "tanh" in text}
    assert fused == {"cuda"} and set(asked) == {("cudnn", True)}
    asked.clear()
    lowered("cuda", AttentionSettings(cap=5.0))
    gpus[0].compute_capability = "7.5"
    lowered("cuda", AttentionSettings())
    assert not asked


def test_heads_are_consecutive_columns() -> None:
    x = normal(2, 3, 12)
    split = split_heads(x, 4)
    assert split.shape == (2, 3, 3, 4)
    np.testing.assert_array_equal(split[:, :, 1], x[:, :, 4:8])


ROPES = {
    "plain": Rope(),
    "high base": Rope(theta=500000.0),
    "linear": Rope(kind="linear", factor=4.0),
    "dynamic": Rope(kind="dynamic", factor=2.0, max_positions=16),
    "llama3": Rope(kind="llama3", factor=8.0, max_positions=64, theta=500.0),
    "llama3 other bands": Rope(
        kind="llama3", factor=4.0, max_positions=256, low_freq_factor=2.0, high_freq_factor=16.0
    ),
}


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_positions_are_those_of_transformers(name: str, length: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope, (n, k, h) = ROPES[name], (4, 2, 16)
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta, "factor": rope.factor}
    if rope.kind == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
        parameters["original_max_position_embeddings"] = rope.max_positions
    longest = 2 * rope.max_positions if rope.kind == "llama3" else rope.max_positions
    config = LlamaConfig(
        hidden_size=n * h,
        num_attention_heads=n,
        max_position_embeddings=longest,
        rope_parameters=parameters,
    )
    q, key = normal(2, length, n, h), normal(2, length, k, h)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    theirs = apply_rotary_pos_emb(*(torch.from_numpy(x.swapaxes(1, 2)) for x in (q, key)), cos, sin)
    for got, expected in zip(rotate(rope, q, key), theirs, strict=True):
        close(got, expected.numpy().swapaxes(1, 2))


def test_rotary_positions_turn_pairs_by_their_angle() -> None:
    """Position t turns the pair (i, i + h/2) by t theta^(-2i/h), so scores depend on distance."""
    q = normal(1, 1, 1, 8)
    turned = np.asarray(
        rotate(Rope(theta=100.0), np.tile(q, (1, 6, 1, 1)), np.tile(q, (1, 6, 1, 1)))[0]
    )[0, :, 0]
    pairs = turned[:, :4] + 1j * turned[:, 4:]
    angles = np.arange(6)[:, None] * 100.0 ** (-np.arange(4) / 4)[None, :]
    close(np.abs(pairs - pairs[:1] * np.exp(1j * angles)), np.zeros((6, 4)))
    scores = turned @ turned.T
    for distance in range(6):
        close(np.diagonal(scores, distance), np.full(6 - distance, scores[0, distance]))


def test_layers_keep_the_type_of_their_input() -> None:
    x = jnp.asarray(normal(1, 4, 2, 8), jnp.bfloat16)
    rotated = rotate(Rope(), x, x)
    assert {
        y.dtype
        for y in (*rotated, attention(x, x, x, AttentionSettings(2)), linear(Linear(x[0, 0]), x))
    } == {jnp.dtype(jnp.bfloat16)}
