"""What goes into the output directory, and the check that it reads back as it was written."""

import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.states import fits_in_memory
from models.arch import Block, Model, apply_block, embed
from models.checkpoint.output_format import Form
from models.checkpoint.reader import Checkpoint, open_checkpoint, weight_files
from models.checkpoint.writer import Writer
from models.families import hf
from models.processes import run_on_primary
from models.sharding import local
from pruning.types import Outcome

REPORT = "pruning_report.json"


class RoundTripCheck:
    """A sink that writes each finished block and runs a fixed batch through it, to compare with the checkpoint loaded back. What the writer
    holds already has been through it."""

    def __init__(self, model: Model, writer: Writer, length: int = 32):
        self._model, self._writer = model, writer
        vocab, length = (
            model.arch.config.vocab,
            min(length, getattr(model.arch.config, "positions", length)),
        )
        self.tokens = jnp.asarray(np.arange(length) * 7919 % vocab, jnp.int32)[
            None, :
        ]  # a prime's multiples: many different tokens
        self._x = embed(model.arch, model.non_block, self.tokens)
        for block in writer.stored():
            self._x = apply_block(model.arch, block, self._x)

    def put(self, i: int, block: Block) -> None:
        """Write block i, and hand the batch on through it."""
        block = local(block)
        self._writer.put(i, block)
        self._x = apply_block(self._model.arch, block, self._x)

    def logits(self) -> jax.Array:
        """The logits [1 length vocab] of what was put."""
        return self._model.arch.head(self._model.non_block, self._x)

    def difference(self, loaded: Model) -> float:
        """Largest absolute difference of the logits on the fixed batch between what was put and a loaded model."""
        x = embed(loaded.arch, loaded.non_block, self.tokens)
        for block in loaded.blocks:
            x = apply_block(loaded.arch, block, x)
        return largest_difference(self.logits(), loaded.arch.head(loaded.non_block, x))


def largest_difference(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> float:
    """Of the entries of two arrays; equal infinities and two NaN are no difference, one NaN is an infinite one."""
    a, b = np.asarray(a), np.asarray(b)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    return float(
        np.nan_to_num(
            np.where(equal, 0.0, np.abs(np.subtract(a, b, where=~equal, out=np.zeros_like(a)))),
            nan=np.inf,
        ).max()
    )


class Check(NamedTuple):
    """Whether a loader gave the logits that were meant, or was not asked (then ok), and what to say of it."""

    ok: bool
    said: str
    asked: bool = True

    @property
    def found(self) -> bool | None:
        """`ok`; None where it was not asked."""
        return self.ok if self.asked else None


class Written(NamedTuple):
    """A checkpoint that was loaded back. `padding`: numbers stored that only fill narrower blocks up."""

    loaded: Checkpoint
    form: Form
    topiary: str
    transformers: Check
    padding: int


def load_back(
    directory: pathlib.Path, form: Form, echo: RoundTripCheck, dtype: jnp.dtype, parameters: int
) -> Written:
    """Open the written checkpoint as any user would, with our loader and with transformers where torch is there, and compare logits.

    Args:
      parameters: that were put in, so that the others are padding.
    RuntimeError if our own loader gives others than rounding allows.
    """
    loaded = open_checkpoint(directory, dtype)
    difference = echo.difference(loaded.model)
    allowed = 1e-3 if dtype == jnp.float32 else 0.5
    if difference > allowed:
        raise RuntimeError(
            f"the written checkpoint gives other logits than the pruned model (by {difference:.3g}); --output was not touched"
        )
    said = f"largest difference of the logits {difference:.2g}"
    check = Check(*run_on_primary(lambda: _by_transformers(directory, echo, allowed)))
    return Written(loaded, form, said, check, loaded.parameters - parameters)


def _by_transformers(directory: pathlib.Path, echo: RoundTripCheck, allowed: float) -> Check:
    """What transformers makes of the checkpoint. It is another program with versions of its own: that it fails is told, not raised.

    It holds the whole model; one that is too large for that is read from its files as it runs, which needs accelerate.
    """
    if not importlib.util.find_spec("torch"):
        return Check(True, "not checked: PyTorch is not installed", asked=False)
    offload = not fits_in_memory(sum(f.stat().st_size for f in weight_files(directory)))
    if offload and not importlib.util.find_spec("accelerate"):
        return Check(
            True,
            "not checked: for a model of this size transformers needs accelerate (pip install accelerate)",
            asked=False,
        )
    try:
        theirs = _transformers_logits(directory, np.asarray(echo.tokens, np.int64), offload)
    except Exception as e:
        return Check(
            False,
            f"cannot load it ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})",
        )
    difference = largest_difference(echo.logits(), theirs)
    return Check(difference <= allowed, f"largest difference of the logits {difference:.2g}")


def _transformers_logits(directory: pathlib.Path, tokens: np.ndarray, offload: bool) -> np.ndarray:
    """Logits float32 [b t vocab] of the checkpoint as transformers loads it; `offload` leaves weights in their files until needed."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as elsewhere, torch.no_grad():
        options = {"device_map": {"": "disk"}, "offload_folder": elsewhere} if offload else {}
        model = AutoModelForCausalLM.from_pretrained(
            directory, trust_remote_code=True, dtype="auto", **options
        ).eval()
        return model(torch.tensor(tokens)).logits.float().numpy()


def by_linear(
    specs: tuple[Block, ...],
    per_block: tuple[Mapping[str, Any], ...],
    change: Callable[[Any], Any] = lambda x: x,
) -> dict[str, Any]:
    """{checkpoint's name of the linear: change(value)} from one {slot: value} a block."""
    return {
        hf.linear_name(s, slot): change(v)
        for s, found in zip(specs, per_block, strict=bool(per_block))
        for slot, v in found.items()
    }


def pruning_record(
    checkpoint: Checkpoint, outcome: Outcome, zeros: Mapping[str, int]
) -> dict[str, Any]:
    """`pruning.json`: what was removed, in terms of the original model's linears and indices."""
    if outcome.removed:
        linears = by_linear(
            checkpoint.specs,
            outcome.removed,
            lambda r: {"rows": list(r.rows), "columns": list(r.columns), "cut": r.cut},
        )
    else:
        linears = {name: {"zeros": count} for name, count in zeros.items()}
    kept = outcome.kept_blocks
    blocks = {} if kept is None else {"kept_blocks": list(kept)}
    kind = "blocks" if blocks else "units" if outcome.removed else "weights"
    return {"format": 1, "kind": kind, **blocks, "linears": linears}
