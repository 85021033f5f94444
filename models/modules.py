"""The Flax face of a model: one linen module over the same pure functions, for `.init`, `.apply` and `.tabulate`.

Parameters are created under the names of the pytrees' fields: {"params": {"ends": {"embed": ...}, "blocks_0": {"q.w": ...}, ...}}.
Widths live in the arrays, so a pruned model's variables apply too when their shapes are those of its configuration.
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
    """One parameter for every Spec of a tree; returns the tree with the arrays in place."""

    specs: Any
    config: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> Any:
        def one(path: tuple[Any, ...], spec: hf.Spec) -> jax.Array:
            return self.param(_name(path), initializer(self.config, spec))

        return jax.tree.map_with_path(one, self.specs, is_leaf=hf.is_spec)


class CausalLM(nn.Module):
    """A LLaMA- or OPT-family language model from its Hugging Face configuration (the contents of `config.json`)."""

    config: Mapping[str, Any]

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits float32 [b t vocab] of tokens int [b t]."""
        arch, non_block, blocks = hf.specs(self.config)
        parts = [Parameters(b, self.config, name=f"blocks_{i}")() for i, b in enumerate(blocks)]
        return logits(
            Model(arch, Parameters(non_block, self.config, name="ends")(), tuple(parts)), tokens
        )


def variables(model: Model) -> dict[str, Any]:
    """A model's parameters as the variables that `CausalLM.apply` takes."""

    def flat(tree: Any) -> dict[str, jax.Array]:
        return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}

    return {
        "params": {"ends": flat(model.non_block)}
        | {f"blocks_{i}": flat(b) for i, b in enumerate(model.blocks)}
    }
