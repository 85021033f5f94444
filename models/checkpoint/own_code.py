"""The class that ships with a checkpoint of our own type, whose blocks differ in width."""

import pathlib
from collections.abc import Mapping
from typing import Any

from models.families import hf
from models.families.fields import OWN, kind_of

# Its file.
CODE = "modeling_pruned.py"


def own_code(config: Mapping[str, Any]) -> str:
    """Return the source of the class.

    Args:
      config: Contents of the checkpoint's `config.json`.
    """
    kind, family = kind_of(config), hf.family(config)
    path = pathlib.Path(__file__).parent / "remote" / f"{family.remote}.py"
    code = path.read_text(encoding="utf-8")
    # One source serves all types with the same modules: only the names differ.
    for name, real in (
        ("topiary_llama", OWN + kind),
        ("LlamaConfig", family.config_class),
        ("LlamaForCausalLM", family.model_class),
    ):
        code = code.replace(name, real)
    return code
