"""Check that the written checkpoint loads as it was meant, and record what was removed."""

import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.states import fits_in_memory
from models.arch import Block, Model, NonBlockParams, apply_block, embed
from models.checkpoint.output_format import Form
from models.checkpoint.reader import Checkpoint, open_checkpoint, weight_files
from models.checkpoint.stored import rounded
from models.checkpoint.writer import Writer
from models.families import hf
from models.processes import run_on_primary
from models.progress import Advance, Progress, no_advance, no_progress
from models.sharding import local
from pruning.types import Outcome

REPORT = "pruning_report.json"
RECORD = "pruning.json"  # what a run removed, of the dense model's linears and blocks
PRIME = 7919  # its multiples are many different tokens
# Largest difference of logits that rounding may cause, in float32 and in lower precision.
TOLERANCE = 1e-3
TOLERANCE_LOW_PRECISION = 0.5


class RoundTripCheck:
    """A sink that writes each finished block and runs a fixed batch through it.

    The logits of the batch are compared with those of the checkpoint loaded back.

    Args:
      model: The dense model.
      writer: Writes the blocks; the batch first goes through those that it has already.
      deferred: Whether the method changes what is outside the blocks, so that the batch can run
        only when it is finished.
      length: Tokens in the batch, at most the model's positions.

    Attributes:
      tokens: The batch, int32 [1 time].
      dtype: Type that the run computes in.
    """

    def __init__(
        self, model: Model, writer: Writer, deferred: bool = False, length: int = 32
    ) -> None:
        self._model = model
        self._writer = writer
        self._restored = writer.blocks  # those of an interrupted run
        arch = model.arch
        length = min(length, getattr(arch.config, "positions", length))
        tokens = np.arange(length) * PRIME % arch.config.vocab
        self.tokens = jnp.asarray(tokens, jnp.int32)[None, :]
        self._deferred = deferred
        self._non_block = model.non_block
        self.dtype = model.non_block.embed.dtype
        if not deferred:
            self.run_stored(model.non_block)

    def run_stored(self, non_block: NonBlockParams) -> None:
        """Run the batch through the blocks that the writer has.

        Args:
          non_block: Parameters outside the blocks.
        """
        arch, non_block = self._model.arch, rounded(local(non_block), self._writer.dtype)
        self._non_block = non_block
        self._x = embed(arch, non_block, self.tokens)
        for block in self._writer.stored():
            # Files may hold a narrower type than the run computes in.
            block = jax.tree.map(lambda x: x.astype(self.dtype), block)
            self._x = apply_block(arch, block, self._x)

    def put(self, i: int, block: Block) -> None:
        """Write a block and run the batch through it.

        Args:
          i: Index of the block.
          block: The finished block.
        """
        if i < self._restored:
            return  # a method whose search is finished gives all blocks again
        block = local(block)
        self._writer.put(i, block)
        if self._deferred:
            return
        self._x = apply_block(self._model.arch, rounded(block, self._writer.dtype), self._x)

    def logits(self) -> jax.Array:
        """Return the logits [1 time vocab] of the batch."""
        return self._model.arch.head(self._non_block, self._x)

    def difference(
        self, loaded: Model, positions: int | None = None, advance: Advance = no_advance
    ) -> float:
        """Return the largest absolute difference to the logits of another model.

        Args:
          loaded: The model that was loaded back.
          positions: Number of leading positions to compare; None for all.
          advance: Called after each block.
        """
        x = embed(loaded.arch, loaded.non_block, self.tokens)
        for block in loaded.blocks:
            x = apply_block(loaded.arch, block, x)
            advance()
        logits = loaded.arch.head(loaded.non_block, x)
        return largest_difference(self.logits()[:, :positions], logits[:, :positions])


def largest_difference(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> float:
    """Return the largest absolute difference of the entries of two arrays.

    Equal infinities and two NaN do not differ; one NaN differs infinitely from a number.

    Args:
      a: One array.
      b: The other, of the same shape.
    """
    a, b = np.asarray(a), np.asarray(b)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    # Equal infinities are not subtracted: that would give NaN.
    differences = np.abs(np.subtract(a, b, where=~equal, out=np.zeros_like(a)))
    return float(np.nan_to_num(np.where(equal, 0.0, differences), nan=np.inf).max())


CHECKS = ("transformers", "topiary", "none")


class Check(NamedTuple):
    """Result of loading the checkpoint with one library.

    Attributes:
      ok: False if the logits differ; True if they agree, or the check was not made.
      message: The result in words.
      made: Whether the check was made.
    """

    ok: bool
    message: str
    made: bool = True

    @property
    def result(self) -> bool | None:
        """Return `ok`, or None if the check was not made."""
        return self.ok if self.made else None


class Written(NamedTuple):
    """A checkpoint that was written and loaded back.

    Attributes:
      loaded: The checkpoint as it loads.
      form: Configuration that it was written in.
      topiary: Result of our own loader.
      transformers: Result of transformers.
      padding: Number of stored values that only fill narrower blocks.
      other_formats: What `launch.run.formats.write_formats` wrote beside it.
    """

    loaded: Checkpoint
    form: Form
    topiary: Check
    transformers: Check
    padding: int
    other_formats: Mapping[str, Any] = MappingProxyType({})


def load_back(
    directory: pathlib.Path,
    form: Form,
    check: RoundTripCheck,
    dtype: jnp.dtype,
    parameters: int,
    by: str,
    progress: Progress = no_progress,
) -> Written:
    """Load the written checkpoint as a user would, and compare logits.

    Logits that differ are a result of the check and do not end the run.

    Args:
      directory: The checkpoint.
      form: Configuration that it was written in.
      check: Check that has seen all pruned blocks.
      dtype: Type of the model.
      parameters: Number of parameters that were written, padding not counted.
      by: One of CHECKS: "transformers", where PyTorch is installed, and our own loader; "topiary",
        our own alone; "none", which compares nothing.
      progress: Shows the progress.
    """
    loaded = open_checkpoint(directory, dtype)
    by_topiary = by_transformers = Check(True, f"not checked: --check={by}", made=False)
    tolerance = TOLERANCE if dtype == jnp.float32 else TOLERANCE_LOW_PRECISION
    if by != "none":
        advance = progress("loading the checkpoint back", len(loaded.model.blocks), unit="blocks")
        by_topiary = _compared(check.difference(loaded.model, advance=advance), tolerance)
    if by == "transformers":
        advance = progress("loading it in transformers", 1)
        result = run_on_primary(lambda: _by_transformers(directory, check, tolerance))
        by_transformers = Check(*result)  # JSON made it a list where there are several processes
        advance()
    return Written(loaded, form, by_topiary, by_transformers, loaded.parameters - parameters)


def _compared(difference: float, tolerance: float) -> Check:
    """Return the result of comparing logits."""
    return Check(difference <= tolerance, f"largest difference of the logits {difference:.2g}")


def _by_transformers(directory: pathlib.Path, check: RoundTripCheck, tolerance: float) -> Check:
    """Compare the logits that transformers gives.

    transformers holds the whole model. It reads a model that is too large for that from its files
    as it runs, which needs accelerate.
    """
    if not importlib.util.find_spec("torch"):
        return Check(True, "not checked: PyTorch is not installed", made=False)
    offload = not fits_in_memory(sum(f.stat().st_size for f in weight_files(directory)))
    if offload and not importlib.util.find_spec("accelerate"):
        reason = "transformers needs accelerate for a model of this size (pip install accelerate)"
        return Check(True, f"not checked: {reason}", made=False)
    try:
        # That of the run: in the stored type both would differ by rounding.
        dtype = str(check.dtype)
        logits = _transformers_logits(directory, np.asarray(check.tokens, np.int64), dtype, offload)
        return _compared(largest_difference(check.logits(), logits), tolerance)
    except Exception as e:
        # transformers has versions of its own: its failure is reported and does not end the run.
        message = (str(e).splitlines() or [""])[0]
        return Check(False, f"cannot load it ({type(e).__name__}: {message})")


def _transformers_logits(
    directory: pathlib.Path, tokens: np.ndarray, dtype: str, offload: bool
) -> np.ndarray:
    """Return transformers' logits, float32 [batch time vocab].

    Args:
      directory: The checkpoint.
      tokens: The batch, int64 [batch time].
      dtype: Name of the type to compute in.
      offload: Whether weights stay in their files until they are needed.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        options = {"device_map": {"": "disk"}, "offload_folder": folder} if offload else {}
        model = AutoModelForCausalLM.from_pretrained(
            directory, trust_remote_code=True, dtype=getattr(torch, dtype), **options
        ).eval()
        return model(torch.tensor(tokens)).logits.float().numpy()


def by_linear(
    specs: tuple[Block, ...],
    per_block: tuple[Mapping[str, Any], ...],
    convert: Callable[[Any], Any] = lambda x: x,
) -> dict[str, Any]:
    """Rename values from slots of blocks to linears of the checkpoint.

    Args:
      specs: Shapes of each block.
      per_block: Values by slot, for each block; empty for no values.
      convert: Converts each value.

    Returns:
      Converted values by the linear's name in the checkpoint.
    """
    result = {}
    for spec, values in zip(specs, per_block, strict=bool(per_block)):
        for slot, value in values.items():
            result[hf.linear_name(spec, slot)] = convert(value)
    return result


def pruning_record(
    checkpoint: Checkpoint, outcome: Outcome, zeros: Mapping[str, int]
) -> dict[str, Any]:
    """Return the content of `pruning.json`, in terms of the dense model's linears and indices.

    Args:
      checkpoint: The dense checkpoint.
      outcome: Result of the method.
      zeros: Number of weights that are zero or absent, by linear.
    """
    if outcome.removed:
        linears = by_linear(
            checkpoint.specs,
            outcome.removed,
            lambda r: {"rows": list(r.rows), "columns": list(r.columns), "cut": r.cut},
        )
    else:
        linears = {name: {"zeros": count} for name, count in zeros.items()}
    kind = "units" if outcome.removed else "weights"
    record: dict[str, Any] = {"format": 1, "kind": kind}
    if outcome.kept_blocks is not None:
        record["kind"] = "blocks"
        record["kept_blocks"] = list(outcome.kept_blocks)
    if outcome.kept_experts is not None:
        record["kind"] = "experts"
        record["kept_experts"] = [k and list(k) for k in outcome.kept_experts]
    return record | {"linears": linears}
