"""The calibration walk as a request asks for it."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import numpy as np

from calibration.journal import digest
from calibration.observers import Observer
from calibration.passes import BlockResult, Visit, fold_blocks, walk_blocks
from calibration.states import States
from models.arch import Block, Model
from pruning.types import Request


def _options(model: Model, request: Request, what: str) -> dict[str, Any]:
    advance = request.stage(what, len(model.blocks))
    return {
        "batch": request.batch,
        "mesh": request.mesh,
        "offload": request.offload,
        "advance": advance,
    }


def walk(
    model: Model,
    tokens: np.ndarray,
    request: Request,
    visit: Callable[[int, Block, States, bool], BlockResult],
    what: str,
    *,
    durable: bool = True,
) -> list[Any]:
    """`walk_blocks` with the request's batch, mesh and tier, and a progress bar that says `what`; every block's record.

    Args:
      durable: whether it is a step of the request's journal.
    """
    return walk_blocks(
        model,
        tokens,
        visit,
        journal=request.journal if durable else None,
        **_options(model, request, what),
    )


def fold(
    model: Model,
    tokens: np.ndarray,
    request: Request,
    visit: Visit,
    *,
    watch: Mapping[str, Observer],
    propagate: Literal["pruned", "dense"],
    what: str,
    key: Hashable = None,
) -> list[Any]:
    """`fold_blocks` with the request's batch, mesh, tier and journal, and a progress bar that says `what`; every block's record.

    Args:
      key: of a walk that only looks: what the records depend on beside the model, and the tokens if anything is watched.
    Where nothing is watched blocks are visited alone, without activations.
    """
    tokens = tokens if watch else tokens[:0]
    return fold_blocks(
        model,
        tokens,
        visit,
        watch=watch,
        propagate=propagate if watch else "pruned",
        journal=request.journal,
        key=key and (key, digest(tokens)),
        **_options(model, request, what),
    )
