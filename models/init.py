"""Random parameters for a configuration: what `launch.pretrain` starts from and tests are made of."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.arch import Model
from models.families import hf

RESIDUAL = ("o_proj", "down_proj", "out_proj", "fc2")  # linears that write to the residual stream


def initializer(config: Mapping[str, Any], spec: hf.Spec) -> Callable[[jax.Array], jax.Array]:
    """key -> float32 array for a Spec: ones, zeros, or normal of standard deviation `initializer_range` (`init_std` in OPT; 0.02).

    What writes to the residual stream is scaled by 1/sqrt(2 blocks), so its variance does not grow with depth (Radford et al. 2019,
    section 2.3).
    """
    std = config.get("initializer_range", config.get("init_std", 0.02))
    depth = (
        math.sqrt(2 * config["num_hidden_layers"])
        if any(part in spec.name for part in RESIDUAL)
        else 1.0
    )

    def draw(key: jax.Array) -> jax.Array:
        if spec.init == "normal":
            return jax.random.normal(key, spec.shape) * (std / depth)
        return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0)

    return draw


def init_model(config: Mapping[str, Any], key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Model:
    """A model with random parameters, see `initializer`."""
    arch, non_block, blocks = hf.specs(config)
    leaves, tree = jax.tree.flatten((non_block, blocks), is_leaf=hf.is_spec)
    keys = jax.random.split(key, len(leaves))
    arrays = [initializer(config, s)(k).astype(dtype) for s, k in zip(leaves, keys, strict=True)]
    non_block, blocks = jax.tree.unflatten(tree, arrays)
    return Model(arch, non_block, blocks)
