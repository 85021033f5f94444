"""What goes into the output directory, and the check that it reads back as it was written."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from models import hf
from models.arch import Block, Model, apply_block, embed
from models.store import Checkpoint, Writer, open_checkpoint
from pruning.types import Outcome

REPORT = "pruning_report.json"


class Echo:
    """A sink that writes each finished block and runs a fixed batch through it, to compare with the checkpoint loaded back."""

    def __init__(self, model: Model, writer: Writer, length: int = 32):
        self._model, self._writer = model, writer
        vocab = model.arch.config.vocab
        self.tokens = jnp.asarray(np.arange(length) * 7919 % vocab, jnp.int32)[
            None, :
        ]  # a prime's multiples: many different tokens
        self._x = embed(model.arch, model.ends, self.tokens)

    def put(self, i: int, block: Block) -> None:
        """Write block i, and hand the batch on through it."""
        self._writer.put(i, block)
        self._x = apply_block(self._model.arch, block, self._x)

    def difference(self, loaded: Model) -> float:
        """Largest absolute difference of the logits on the fixed batch between what was put and a loaded model; NaN counts as inf."""
        x = embed(loaded.arch, loaded.ends, self.tokens)
        for block in loaded.blocks:
            x = apply_block(loaded.arch, block, x)
        a, b = (m.arch.head(m.ends, h) for m, h in ((self._model, self._x), (loaded, x)))
        return float(
            jnp.nan_to_num(jnp.max(jnp.where((a == b) | (jnp.isnan(a) & jnp.isnan(b)), 0.0, jnp.abs(a - b))), nan=jnp.inf)
        )


def load_back(directory: pathlib.Path, echo: Echo, dtype: jnp.dtype) -> tuple[Checkpoint, float]:
    """Open the written checkpoint as any user would; its largest logit difference to what was written. RuntimeError beyond rounding."""
    loaded = open_checkpoint(directory, dtype)
    difference = echo.difference(loaded.model)
    if difference > (1e-3 if dtype == jnp.float32 else 0.5):
        raise RuntimeError(
            f"the written checkpoint gives other logits than the pruned model (by {difference:.3g}); nothing was kept"
        )
    return loaded, difference


def by_linear(
    specs: tuple[Block, ...], per_block: tuple[Mapping[str, Any], ...], change: Callable[[Any], Any] = lambda x: x
) -> dict[str, Any]:
    """{checkpoint's name of the linear: change(value)} from one {slot: value} a block."""
    return {
        hf.linear_name(s, slot): change(v)
        for s, found in zip(specs, per_block, strict=bool(per_block))
        for slot, v in found.items()
    }


def pruning_record(checkpoint: Checkpoint, outcome: Outcome, zeros: Mapping[str, int]) -> dict[str, Any]:
    """`pruning.json`: what was removed, in terms of the original model's linears and indices."""
    if outcome.removed:
        linears = by_linear(
            checkpoint.specs, outcome.removed, lambda r: {"rows": list(r.rows), "columns": list(r.columns), "cut": r.cut}
        )
    else:
        linears = {name: {"zeros": count} for name, count in zeros.items()}
    kept = outcome.kept_blocks
    blocks = {} if kept is None else {"kept_blocks": list(kept)}
    kind = "blocks" if blocks else "units" if outcome.removed else "weights"
    return {"format": 1, "kind": kind, **blocks, "linears": linears}
