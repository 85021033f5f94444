"""The calibration walk as a request asks for it."""

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np

from calibration.fold import Visit, fold_blocks
from calibration.journal import digest
from calibration.observers import Observer
from models.arch import Model
from pruning.types import Request


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
    """`fold_blocks` with the request's batch, mesh and journal, and a progress bar that says `what`; every block's record.

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
        batch=request.batch,
        mesh=request.mesh,
        advance=request.stage(what, len(model.blocks)),
        journal=request.journal,
        key=key and (key, digest(tokens)),
    )
