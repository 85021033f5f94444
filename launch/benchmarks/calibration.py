"""Calibration passes, ours and PyTorch's forward pass, for `launch.bench --what=calibration`."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from calibration.observers import Observer, batch_norms, second_moment
from calibration.passes import Stats, calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Block, Model
from models.checkpoint.reader import Checkpoint


def calibration_passes(
    model: Model, tokens: np.ndarray, batch: int, mesh: Mesh | None
) -> dict[str, Callable[[], None]]:
    """Return the calibration passes to time, each a dense forward with statistics.

    Args:
      model: The model, in memory.
      tokens: Calibration windows, int [samples time].
      batch: Windows at a time.
      mesh: Devices; None for one.

    Returns:
      By name: Wanda's statistics of the input of every linear, and LLMRank's statistics of the
      feed-forward part.
    """
    group, tap = model.arch.group("neurons"), model.arch.tap
    up, down = group.writers[-1].name, group.reader.name
    watches: dict[str, dict[str, Observer]] = {
        "Wanda statistics": {s.reads: second_moment for s in model.arch.slots},
        "LLMRank statistics": dict.fromkeys((tap(up), tap(down), up, down), batch_norms),
    }

    def calibrate(watch: dict[str, Observer]) -> None:
        kept = []

        def visit(i: int, block: Block, stats: Stats) -> tuple[Block, None]:
            kept.append(stats)
            return block, None

        calibrate_blocks(
            model,
            tokens,
            Runtime(batch, mesh),
            visit,
            watch=watch,
            propagate="dense",
            name="calibrating",
        )
        jax.block_until_ready(kept)

    return {name: functools.partial(calibrate, watch) for name, watch in watches.items()}


def torch_forward(
    checkpoint: Checkpoint, tokens: np.ndarray, batch: int
) -> Callable[[], None] | None:
    """Return PyTorch's forward pass through the decoder without its head.

    Args:
      checkpoint: The model.
      tokens: Calibration windows, int [samples time].
      batch: Windows at a time.

    Returns:
      A function that runs all windows; None without torch.
    """
    try:
        import torch
    except ImportError:
        return None
    from transformers import AutoModelForCausalLM

    directory = checkpoint.directory
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    decoder, ids = model.get_decoder(), torch.tensor(tokens.astype(np.int64))

    def forward() -> None:
        with torch.no_grad():
            for start in range(0, len(ids), batch):
                decoder(ids[start : start + batch], use_cache=False)

    return forward
