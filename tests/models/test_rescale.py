"""Blocks for a stream of another scale compute the same function, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.arch import embed
from models.families import hf
from reference import small

SCALE = np.float32(1.7)


@pytest.mark.parametrize(
    "family",
    [
        f if f in ("llama", "opt", "gemma2") else pytest.param(f, marks=pytest.mark.slow)
        for f in small.EVERY_FAMILY
    ],
)
def test_a_rescaled_block_scales_its_output(family: str) -> None:
    m = small.model(family)
    assert m.arch.rescale is not None
    x = 3 * embed(m.arch, m.non_block, small.tokens())
    for block in m.blocks:
        y = m.arch.block(block, x)[0]
        scaled = m.arch.rescale(block, SCALE)
        # Norms add their constant to a larger mean square, hence the tolerance.
        np.testing.assert_allclose(
            m.arch.block(scaled, SCALE * x)[0], SCALE * y, rtol=1e-3, atol=1e-3
        )
        assert not small.same(scaled, block)
        x = y


@pytest.mark.parametrize("family", small.EVERY_FAMILY)
def test_the_head_does_not_see_the_scale(family: str) -> None:
    """So the blocks behind a place in the model can be rescaled, and nothing else."""
    m = small.model(family)
    x = 3 * embed(m.arch, m.non_block, small.tokens())
    np.testing.assert_allclose(
        m.arch.head(m.non_block, SCALE * x), m.arch.head(m.non_block, x), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("field", ["do_layer_norm_before", "_remove_final_layer_norm"])
def test_a_head_that_sees_the_scale_has_no_rescaling(field: str) -> None:
    config = small.CONFIGS["opt"] | {field: field.startswith("_")}
    assert hf.specs(config)[0].rescale is None


def test_rescaling_keeps_types_and_rounds_once() -> None:
    m = small.model("gemma2", dtype="bfloat16")
    assert m.arch.rescale is not None
    new = m.arch.rescale(m.blocks[0], SCALE)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    old = m.blocks[0].mlp_out_norm.scale
    want = (1 + np.asarray(old, np.float32)) * SCALE - 1
    assert np.array_equal(new.mlp_out_norm.scale, jnp.asarray(want, "bfloat16"))
