"""Random parameters for a configuration, the start of `launch.pretrain` and of many tests."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.arch import Model
from models.families import hf

# Linears that write to the residual stream, by a part of their tensor names.
RESIDUAL = ("o_proj", "down_proj", "out_proj", "fc2")


def initializer(config: Mapping[str, Any], spec: hf.Spec) -> Callable[[jax.Array], jax.Array]:
    """Return the initialiser of a tensor: ones, zeros or normal.

    The standard deviation is `initializer_range` of the configuration (`init_std` in OPT, else
    0.02). Linears that write to the residual stream are scaled by 1/sqrt(2 blocks), so its variance
    does not grow with depth.

    Source: Radford et al. 2019, section 2.3.

    Args:
      config: Contents of `config.json`.
      spec: Spec of the tensor.

    Returns:
      Function key -> array of the tensor's shape, float32.
    """
    std = config.get("initializer_range", config.get("init_std", 0.02))
    writes_residual = any(part in spec.name for part in RESIDUAL)
    depth = math.sqrt(2 * config["num_hidden_layers"]) if writes_residual else 1.0

    def draw(key: jax.Array) -> jax.Array:
        if spec.init == "normal":
            return jax.random.normal(key, spec.shape) * (std / depth)
        return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0)

    return draw


def init_model(config: Mapping[str, Any], key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Model:
    """Make a model with random parameters, as `initializer` draws them.

    Args:
      config: Contents of `config.json`.
      key: Key of the draws.
      dtype: Type of the parameters.

    Returns:
      Model in memory.
    """
    arch, non_block, blocks = hf.specs(config)
    leaves, tree = jax.tree.flatten((non_block, blocks), is_leaf=hf.is_spec)
    # One key for each tensor in the tree's order, so a seed fixes all parameters.
    keys = jax.random.split(key, len(leaves))
    arrays = [initializer(config, s)(k).astype(dtype) for s, k in zip(leaves, keys, strict=True)]
    non_block, blocks = jax.tree.unflatten(tree, arrays)
    return Model(arch, non_block, blocks)
