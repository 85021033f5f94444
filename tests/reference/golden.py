"""Goldens that the authors' own code left in ../shared/golden, and our models beside them."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from eval.perplexity import perplexity
from models.arch import Model
from models.checkpoint.reader import in_memory, open_checkpoint
from models.families.hf import linear_name
from pruning.methods import METHODS
from pruning.types import Request, prune

WINDOWS = 8  # evaluated of each pruned model: cross-entropies are stored by window
SPARSITY = {"0.5": (0.5, None), "0.7": (0.7, None), "2of4": (0.5, (2, 4)), "4of8": (0.5, (4, 8))}


@dataclasses.dataclass(
    frozen=True, eq=False
)  # compared by identity, so that statistics can be cached
class Reference:
    """A model with its tokens, and by block {slot: name} as the goldens name its linears."""

    model: Model
    names: tuple[Mapping[str, str], ...]
    calibration: np.ndarray
    evaluation: np.ndarray


@functools.cache
def load(directory: pathlib.Path, tokens: pathlib.Path) -> Reference:
    """Return the model in float32, read once."""
    checkpoint = open_checkpoint(directory, jnp.float32)
    slots = [s.name for s in checkpoint.model.arch.slots]
    names = tuple(
        {s: linear_name(spec, s)[linear_name(spec, s).index("layers.") :] for s in slots}
        for spec in checkpoint.specs
    )
    return Reference(
        in_memory(checkpoint.model),
        names,
        np.load(f"{tokens}_calib.npy"),
        np.load(f"{tokens}_eval.npy"),
    )


def tiny(shared: pathlib.Path, name: str) -> Reference:
    """Return one of the small trained models."""
    return load(shared / "models" / name, shared / "golden/tokens/tiny")


@functools.cache
def index(shared: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the goldens' settings by model and variant."""
    return {
        (r["model"], r["variant"]): r
        for r in json.loads((shared / "golden/index.json").read_text())["runs"]
    }


def golden(shared: pathlib.Path, model: str, variant: str) -> Mapping[str, np.ndarray]:
    """Return the arrays of a golden."""
    return np.load(shared / "golden" / index(shared)[model, variant]["file"])


def bits(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Unpack a mask; True is zero."""
    return np.unpackbits(packed)[: int(np.prod(shape))].reshape(shape).astype(bool)


def assert_perplexity(
    r: Reference, model: Model, window_ce: np.ndarray, rtol: float = 1e-3
) -> None:
    """Assert that each window's perplexity agrees within a relative tolerance."""
    got = perplexity(model, r.evaluation[:WINDOWS], batch=4).cross_entropy
    np.testing.assert_allclose(np.exp(got - window_ce[:WINDOWS]), 1, rtol=rtol)


def pruned(r: Reference, method: str, variant: str) -> Model:
    """Return the model pruned as the golden's name says."""
    sparsity, pattern = SPARSITY[variant]
    return prune(r.model, METHODS[method](), r.calibration, Request(sparsity, pattern))[0]
