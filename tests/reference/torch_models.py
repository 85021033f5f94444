"""The same models in `transformers`, in float32 with eager attention. Needs torch."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest


def save_random(
    config: Mapping[str, Any], directory: pathlib.Path, seed: int = 0, scale: float = 0.3
) -> None:
    """Write a checkpoint that transformers builds from `config`, all parameters random."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * scale + (1.0 if p.ndim == 1 else 0.0))
    model.save_pretrained(directory)


def load(directory: pathlib.Path) -> Any:
    """Load a checkpoint with transformers."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True
    ).eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the logits [b t vocab] of tokens [b t]."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def greedy(model: Any, tokens: np.ndarray, new: int) -> np.ndarray:
    """Return the most likely `new` tokens [b new] after tokens [b t]; texts do not end early."""
    torch = pytest.importorskip("torch")
    model.generation_config.eos_token_id = None
    ids = torch.from_numpy(tokens.astype(np.int64))
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
    )
    return out[:, tokens.shape[1] :].numpy()
