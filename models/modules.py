"""Flax interface of a model: a linen module over the same pure functions.

Parameters are created under the field names of the pytrees:
{"params": {"ends": {"embed": ...}, "blocks_0": {"q.w": ...}, ...}}. Widths live in the arrays, so
variables of a pruned model apply too when their shapes are those of its configuration.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from models.arch import Model, logits
from models.families import hf
from models.init import initializer


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(key.name for key in path)


class Parameters(nn.Module):
    """Parameters of a tree, one for every Spec.

    Attributes:
      specs: Pytree of Spec.
      config: Contents of `config.json`, which the initialisers read.
    """

    specs: Any
    config: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> Any:
        """Return the tree with arrays in place of the specs."""

        def make(path: tuple[Any, ...], spec: hf.Spec) -> jax.Array:
            return self.param(_name(path), initializer(self.config, spec))

        return jax.tree.map_with_path(make, self.specs, is_leaf=hf.is_spec)


class CausalLM(nn.Module):
    """LLaMA- or OPT-family language model for `.init`, `.apply` and `.tabulate`.

    Attributes:
      config: Contents of `config.json`.
    """

    config: Mapping[str, Any]

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Compute the logits of a whole text.

        Args:
          tokens: Token ids, int [b t].

        Returns:
          Logits, float32 [b t vocab].
        """
        arch, non_block_specs, block_specs = hf.specs(self.config)
        blocks = tuple(
            Parameters(b, self.config, name=f"blocks_{i}")() for i, b in enumerate(block_specs)
        )
        non_block = Parameters(non_block_specs, self.config, name="ends")()
        return logits(Model(arch, non_block, blocks), tokens)


def variables(model: Model) -> dict[str, Any]:
    """Return the parameters of a model as the variables that `CausalLM.apply` takes.

    Args:
      model: Model, read into memory if it is not there.
    """

    def flatten(tree: Any) -> dict[str, jax.Array]:
        return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}

    params = {"ends": flatten(model.non_block)}
    params |= {f"blocks_{i}": flatten(b) for i, b in enumerate(model.blocks)}
    return {"params": params}
