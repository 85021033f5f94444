"""The plain PyTorch solvers that ours are timed against do the same work."""

from pathlib import Path

import jax
import numpy as np
import pytest

from launch.benchmarks import torch_admm, torch_solvers
from models.checkpoint.writer import save
from models.init import init_model
from pruning.methods import METHODS
from pruning.types import Request, prune
from reference import sparsegpt as reference
from reference import torch_models

pytestmark = pytest.mark.slow

CONFIG = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    architectures=["LlamaForCausalLM"],
)


def test_plain_sparsegpt_gives_the_weights_of_the_reference(tmp_path: Path) -> None:
    """Up to ties of a rounding."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    w, x = (
        rng.normal(size=(24, 160)),
        rng.normal(size=(600, 160)) @ rng.normal(size=(160, 160)) * 0.1,
    )
    h = x.T @ x * 2 / 4
    got = torch_solvers.sparsegpt_sweep(
        torch.tensor(w, dtype=torch.float32), torch.tensor(h, dtype=torch.float32), 0.5
    ).numpy()
    want, removed = reference.solve(w, h, 0.5)
    assert np.mean((got == 0) == removed) > 0.999
    assert np.quantile(np.abs(got - want), 0.99) < 1e-3


def test_plain_sparsellm_gives_the_weights_of_the_official_variant(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = CONFIG | {"num_hidden_layers": 1, "initializer_range": 0.3}
    model = init_model(config, jax.random.key(0))
    save(tmp_path / "model", model, config, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16), np.int32)
    theirs = torch_models.load(tmp_path / "model")
    (layer,) = theirs.get_decoder().layers
    with torch.no_grad():
        calls = torch_solvers.first_calls(theirs, layer, torch.tensor(tokens.astype(np.int64)))
        torch_solvers.sparsellm_layer(layer, calls, 0.5)
    block = prune(model, METHODS["sparsellm"](variant="official"), tokens, Request(0.5))[0].blocks[
        0
    ]
    for name in ("up", "gate", "down", "q"):
        want = np.asarray(getattr(block, name).w)
        part = layer.self_attn if name == "q" else layer.mlp
        got = getattr(part, f"{name}_proj").weight.detach().numpy()
        assert np.array_equal(got == 0, want == 0), name
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * np.abs(want).max(), err_msg=name)


def test_plain_admm_gives_the_weights_of_ours(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = CONFIG | {"num_hidden_layers": 1, "initializer_range": 0.3}
    model = init_model(config, jax.random.key(0))
    save(tmp_path / "model", model, config, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16), np.int32)
    theirs = torch_models.load(tmp_path / "model")
    (layer,) = theirs.get_decoder().layers
    with torch.no_grad():
        calls = torch_solvers.first_calls(theirs, layer, torch.tensor(tokens.astype(np.int64)))
        torch_admm.admm_layer(layer, calls, 0.5)
    block = prune(model, METHODS["admm"](), tokens, Request(0.5))[0].blocks[0]
    for name in ("q", "k", "v", "o", "up", "gate", "down"):
        want = np.asarray(getattr(block, name).w)
        part = layer.self_attn if name in "qkvo" else layer.mlp
        got = getattr(part, f"{name}_proj").weight.detach().numpy()
        assert np.array_equal(got == 0, want == 0), name
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * np.abs(want).max(), err_msg=name)


def test_plain_sleb_removes_the_same_blocks_in_the_same_order(tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 6, "initializer_range": 0.3}
    model = init_model(config, jax.random.key(0))
    save(tmp_path / "model", model, config, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 16), np.int32)
    theirs = torch_models.load(tmp_path / "model")
    want = prune(model, METHODS["sleb"](blocks=3), tokens, Request(0.0))[1].details["removal_order"]
    assert (
        torch_solvers.sleb_removal_order(theirs, list(theirs.get_decoder().layers), tokens, 3)
        == want
    )
