"""Blocks that are read with zeros compute the same, and have few shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.arch import Model
from models.checkpoint import widths
from models.checkpoint.blocks import LazyBlocks
from models.checkpoint.widths import FewWidths, rounded_count, with_few_widths
from models.families import hf
from reference.small import CONFIGS, MORE_CONFIGS, RAGGED


class Drawn:
    """Random tensors in place of a checkpoint's."""

    def __init__(self, specs: Any) -> None:
        rng = np.random.default_rng(0)
        leaves = jax.tree.leaves(specs, is_leaf=hf.is_spec)
        self._values = {
            s.name: (rng.normal(size=s.shape) * 0.3 + (s.init == "ones")).astype(np.float32)
            for s in leaves
        }

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Return rows of a tensor."""
        return self._values[name][rows]


def drawn(config: Any) -> Model:
    """Return a random model whose blocks are read one at a time."""
    arch, non_block, specs = hf.specs(config)
    tensors: Any = Drawn(specs)
    return Model(arch, non_block, LazyBlocks(tensors, specs, jnp.dtype("float32")))


def shapes(model: Model) -> set[Any]:
    """Return the different shapes of a model's blocks."""
    return {tuple(x.shape for x in jax.tree.leaves(block)) for block in model.blocks}


@pytest.mark.parametrize("family", sorted(RAGGED))
def test_blocks_with_zeros_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "WIDTHS", 1)
    model = drawn(RAGGED[family])
    few = with_few_widths(model)
    assert len(shapes(few)) < len(shapes(model))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 16)), jnp.float32)
    for old, new in zip(model.blocks, few.blocks, strict=True):
        want, got = (model.arch.block(block, x)[0] for block in (old, new))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "olmo2", "mixtral"])
def test_a_model_of_few_shapes_is_read_as_it_is(family: str) -> None:
    model = drawn({**CONFIGS, **MORE_CONFIGS}[family])
    assert with_few_widths(model) is model
    assert isinstance(model.blocks, LazyBlocks) and not isinstance(model.blocks, FewWidths)


def test_numbers_of_units_are_few_and_near() -> None:
    for most in (1, 3, 9, 64, 1536):
        numbers = [rounded_count(n, most) for n in range(most + 1)]
        assert len({*numbers}) <= widths.WIDTHS and min(numbers) > 0
        assert all(n <= got <= most for n, got in enumerate(numbers))
        assert all(got - n <= -(-most // widths.WIDTHS) for n, got in enumerate(numbers))
