"""Agreement of a pruned model with its dense model, token by token.

Perplexity asks for one token of a text. These measures compare all that the two models predict.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eval.forward import last_states
from models.arch import Model, NonBlockParams
from models.errors import InputError
from models.programs import program
from models.progress import Progress, no_progress
from models.sharding import place, to_host

# Positions of each window whose logits are computed together: those of a whole window would be
# larger than a block's weights, twice.
POSITIONS = 32

Head = Callable[[NonBlockParams, jax.Array], jax.Array]


class Estimate(NamedTuple):
    """A mean with its standard error.

    Attributes:
      value: The mean.
      error: Its standard error; None for one sample, or where a sample is not finite.
    """

    value: float
    error: float | None


def estimate(samples: Sequence[float] | np.ndarray) -> Estimate:
    """Estimate a mean from independent samples.

    Args:
      samples: The samples, at least one.
    """
    x = np.asarray(samples, np.float64)
    if len(x) < 2 or not np.all(np.isfinite(x)):
        return Estimate(float(np.mean(x)), None)
    return Estimate(float(np.mean(x)), float(np.std(x, ddof=1)) / math.sqrt(len(x)))


class Agreement(NamedTuple):
    """Agreement of two models over token windows, at the positions that perplexity counts.

    The tokens of a window depend on each other, so they are not so many samples: standard errors
    are those of a mean over windows.

    Attributes:
      window_kl: Mean KL(dense || pruned) of the next-token distributions of each window, in nats
        per token, float64 [windows].
      window_top1: Share of positions of each window where both models have the same most likely
        token, float64 [windows].
    """

    window_kl: np.ndarray
    window_top1: np.ndarray

    @property
    def kl(self) -> Estimate:
        """Return the mean KL divergence in nats per token."""
        return estimate(self.window_kl)

    @property
    def top1(self) -> Estimate:
        """Return the share of equal most likely tokens."""
        return estimate(self.window_top1)


@program("agreement", static=(0, 1))
def _agreement(
    dense_head: Head,
    head: Head,
    dense_non_block: NonBlockParams,
    non_block: NonBlockParams,
    dense_x: jax.Array,
    x: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return mean KL divergence, float32 [b], and number of equal top tokens, int32 [b]."""

    def position(states: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dense_x, x = states  # [b d]
        z, w = (
            dense_head(dense_non_block, dense_x[:, None])[:, 0],
            head(non_block, x[:, None])[:, 0],
        )
        log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(w)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        # q - p sums to zero. With it every term is at least 0, and an error of a log-sum-exp enters
        # by its square: small divergences keep their digits.
        kl = jnp.sum(p * (log_p - log_q) + (q - p), axis=-1)
        return jnp.maximum(kl, 0), jnp.argmax(z, -1) == jnp.argmax(w, -1)

    # The last position predicts no token of the window.
    by_position = tuple(jnp.moveaxis(s[:, :-1], 1, 0) for s in (dense_x, x))
    kl, same = jax.lax.map(position, by_position, batch_size=POSITIONS)
    return jnp.mean(kl, axis=0), jnp.sum(same, axis=0, dtype=jnp.int32)


def check_vocabularies(dense: Model, model: Model) -> None:
    """Check that two models predict the same tokens.

    Args:
      dense: Dense model.
      model: Model to compare with it.

    Raises:
      InputError: Their vocabularies have different sizes.
    """
    theirs, ours = dense.arch.config.vocab, model.arch.config.vocab
    if theirs != ours:
        raise InputError(
            f"has a vocabulary of {theirs} tokens, the model {ours}",
            "give the model that was pruned",
            field="dense",
        )


class Comparison:
    """Comparison of a model with the dense one, a micro-batch of last hidden states at a time.

    The dense model's hidden states stand for its logits, which take vocab / d times their memory.

    Args:
      dense: Dense model, of which only what is outside the blocks is read.
      dense_states: Its hidden states after the last block, [b t d] of each micro-batch on the mesh.
      model: Model to compare with it, likewise.
      mesh: Mesh of the hidden states; None for one device.
    """

    def __init__(
        self, dense: Model, dense_states: Sequence[jax.Array], model: Model, mesh: Mesh | None
    ):
        self._heads = (dense.arch.head, model.arch.head)
        self._non_block = (place(dense.non_block, mesh), place(model.non_block, mesh))
        self._dense_states = dense_states
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, x: jax.Array) -> None:
        """Compare the next micro-batch.

        Args:
          x: Hidden states of the model after its last block, [b t d].
        """
        dense_x = self._dense_states[len(self._parts)]
        kl, same = _agreement(*self._heads, *self._non_block, dense_x, x)
        # Shares in float64, in which all of a window is exactly 1.
        self._parts.append((_float64(kl), _float64(same) / (x.shape[1] - 1)))

    def result(self) -> Agreement:
        """Return the agreement over all windows so far."""
        kl, same = zip(*self._parts, strict=True)
        return Agreement(np.concatenate(kl), np.concatenate(same))


def _float64(x: Any) -> np.ndarray:
    # The mean over many windows must not depend on their order.
    return to_host(x).astype(np.float64)


def agreement(
    dense: Model,
    model: Model,
    windows: np.ndarray,
    *,
    batch: int = 8,
    mesh: Mesh | None = None,
    progress: Progress = no_progress,
    name: str = "comparing",
) -> Agreement:
    """Compare a model with its dense model over token windows.

    Both models read the windows. To compare several with one dense model, keep its hidden states
    and use `Comparison`.

    Args:
      dense: Dense model, whose blocks are read as `eval.forward.last_states` does.
      model: Model to compare with it.
      windows: Token ids, int [windows length], length at least 2.
      batch: Windows in one micro-batch.
      mesh: Mesh, windows are split over its `data` axis; None for one device.
      progress: Shows the progress.
      name: What it says.

    Raises:
      InputError: The vocabularies have different sizes.
    """
    check_vocabularies(dense, model)
    batches = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    steps = windows.size * (len(dense.blocks) + len(model.blocks))
    advance = progress(name, steps, tokens=windows.size)
    states: list[jax.Array] = []
    comparison = Comparison(dense, states, model, mesh)
    passes = (
        last_states(m, place(m.non_block, mesh), batches, mesh, advance) for m in (dense, model)
    )
    for (_, dense_x), (_, x) in zip(*passes, strict=True):
        states.append(dense_x)
        comparison(x)
    return comparison.result()


def equal_starts(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Count the tokens of each row before the two texts first differ.

    Args:
      first: Token ids, int [texts length].
      second: The same of the other model.

    Returns:
      Counts from 0 to length, int [texts].
    """
    return np.sum(np.cumprod(first == second, axis=1), axis=1)
