"""Judge the best candidates of a phase by their loss after the repair."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from calibration.passes import micro_batches
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Block, Model, apply_block, cross_entropy, embed
from models.progress import no_progress
from models.sharding import place, to_host
from pruning.structured.depth_cuts import Remains
from pruning.structured.depth_repair import Repair, repair_and_write
from pruning.structured.sleb_paths import Candidate, Path


class Judge(NamedTuple):
    """A second trial for the best candidates of each phase.

    Attributes:
      finalists: Candidates of lowest loss that are tried again.
      loss: Loss of a model with these pieces after its repair.
      key: All that the loss depends on besides the model, the tokens and the pieces.
    """

    finalists: int
    loss: Callable[[Path], float]
    key: str


def judge(
    by: Judge, candidates: Mapping[int, Candidate], digest: str, runtime: Runtime
) -> dict[int, float]:
    """Return the loss of each candidate after its repair, as a durable step.

    Args:
      by: The judge.
      candidates: Finalists by unit, in order.
      digest: Digest of the tokens.
      runtime: Its journal keeps the losses.
    """

    def compute() -> list[list[float]]:
        return [[u, by.loss(candidate.path)] for u, candidate in candidates.items()]

    paths = tuple((u, candidate.path) for u, candidate in candidates.items())
    found = runtime.step(compute, ("repaired losses", digest, paths, by.key))
    return {int(u): loss for u, loss in found}


def repaired_loss(remains: Remains, tokens: np.ndarray, runtime: Runtime, repair: Repair) -> float:
    """Return the loss of a model after its repair, the sum over windows as in the plain search.

    Each repaired block is run as it is made, so that no second model is in memory.

    Args:
      remains: What stays of the model.
      tokens: Calibration windows, int [samples length].
      runtime: How to execute.
      repair: Kind of repair.
    """
    model: Model = remains.model
    arch, mesh = model.arch, runtime.mesh
    non_block = place(model.non_block, mesh)
    batches = list(micro_batches(tokens, runtime.batch, mesh))
    xs = States((embed(arch, non_block, t) for t in batches), runtime.offload, mesh)

    def run(i: int, block: Block) -> None:
        for j, x in enumerate(xs):
            xs[j] = apply_block(arch, block, x)

    # The repair is part of a trial, and no step of its own.
    quiet = dataclasses.replace(runtime, journal=None, progress=no_progress)
    repair_and_write(remains, tokens, quiet, run, repair)
    losses = (
        to_host(cross_entropy(arch, non_block, x, t)) for x, t in zip(xs, batches, strict=True)
    )
    total = sum(loss.astype(np.float64).sum() for loss in losses)
    return float(total * tokens.shape[1])
