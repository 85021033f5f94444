"""Distillation of logits: divergence over all tokens or the teacher's likeliest, masked LoRA.

Letters: b windows, t positions, v tokens of the vocabulary, k tokens that are kept, r rank of LoRA.

Sources: Hinton et al. 2015 (temperature); Hu et al. 2022 (LoRA); Zimmer et al. 2024, "PERP" (LoRA
under the mask of the weights).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

LORA_SCALE = 2.0  # factor of the product of the adapters: alpha = 2 r in the words of LoRA
CLIP = 1.0  # greatest norm of the gradient
# Positions whose logits are in memory at once: of a whole window they are larger than the model.
POSITIONS = 128


class Adapter(NamedTuple):
    """Low-rank change of a matrix [out in], the product b a.

    Attributes:
      a: Float32 [r in], random at first.
      b: Float32 [out r], zero at first.
    """

    a: jax.Array
    b: jax.Array


class Likeliest(NamedTuple):
    """A distribution by its likeliest tokens.

    Attributes:
      ids: The tokens, int32 [b t k].
      logs: Their log-probabilities, then that of all other tokens together, float32 [b t k+1]; [b t
        k] where no others are left.
    """

    ids: jax.Array
    logs: jax.Array


def log_probabilities(logits: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Return log-probabilities of all tokens, or of some and of all others together.

    The others are one outcome with the sum of their probabilities, so that both models' numbers
    still sum to one, and a student that gives the others too much is told so.

    Args:
      logits: Logits over the temperature, float32 [b t v].
      ids: Tokens that stay apart, int [b t k]; None for all.

    Returns:
      Float32 [b t v], or as `Likeliest.logs`.
    """
    logs = jax.nn.log_softmax(logits, axis=-1)
    if ids is None:
        return logs
    chosen = jnp.take_along_axis(logs, ids, axis=-1)
    if ids.shape[-1] == logits.shape[-1]:
        return chosen
    # Not one less the sum of the chosen: where they have nearly all, the difference is all rounding
    # and its logarithm has no gradient.
    others = jnp.put_along_axis(logs, ids, -jnp.inf, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    return jnp.concatenate([chosen, rest], axis=-1)


def likeliest(logits: jax.Array, k: int) -> Likeliest:
    """Return the k likeliest tokens of a distribution and what is left for the others.

    Args:
      logits: Logits over the temperature, float32 [b t v].
      k: Number of tokens.
    """
    ids = jax.lax.top_k(logits, k)[1]
    return Likeliest(ids, log_probabilities(logits, ids))


def forward_kl(target: jax.Array, logs: jax.Array) -> jax.Array:
    """Return the Kullback-Leibler divergence of the student from the teacher, sum p log(p/q).

    Args:
      target: Log-probabilities of the teacher, float32 [b t outcomes].
      logs: Those of the student, of the same outcomes.

    Returns:
      Divergence of each position in nats, float32 [b t].
    """
    p = jnp.exp(target)
    # An outcome that the teacher never has adds nothing, whatever the student gives it.
    return jnp.sum(p * jnp.where(p > 0, target - logs, 0.0), axis=-1)


def forward_kl_of_logits(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Return what `forward_kl` does over all tokens, from finite logits.

    Arrays of log-probabilities would be written and read again, and make a CPU 1.4 times slower.

    Args:
      teacher: Logits of the teacher, float32 [b t v].
      student: Those of the student.

    Returns:
      Divergence of each position in nats, float32 [b t].
    """
    means = jnp.sum(jax.nn.softmax(teacher, axis=-1) * (teacher - student), axis=-1)
    return means + jax.nn.logsumexp(student, axis=-1) - jax.nn.logsumexp(teacher, axis=-1)


def pieces(x: jax.Array) -> jax.Array:
    """Cut an array into pieces of positions, so that the logits of a piece alone are in memory.

    Args:
      x: One entry for each position, [b t ...].

    Returns:
      Array [pieces b size ...], padded with zeros.
    """
    b, t = x.shape[:2]
    size = min(t, POSITIONS)
    padding = [(0, 0), (0, -t % size)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding)
    return jnp.swapaxes(x.reshape(b, -1, size, *x.shape[2:]), 0, 1)


def joined_pieces(x: jax.Array, t: int) -> jax.Array:
    """Join the pieces of `pieces` again.

    Args:
      x: Array [pieces b size ...].
      t: Number of positions of a window.

    Returns:
      Array [b t ...].
    """
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]


def adapted(w: jax.Array, adapter: Adapter) -> jax.Array:
    """Return a matrix with its low-rank change, which its zeros do not take part in.

    Args:
      w: Matrix of the pruned model, [out in].
      adapter: Its change.

    Returns:
      Matrix in the type of `w`, [out in].
    """
    change = LORA_SCALE * (adapter.b @ adapter.a)
    return jnp.where(w == 0, w, (w.astype(jnp.float32) + change).astype(w.dtype))


def new_adapter(key: jax.Array, shape: tuple[int, ...], rank: int) -> Adapter:
    """Return the adapter of a matrix before training, whose change is zero.

    Args:
      key: Key of the draw.
      shape: Shape of the matrix, (out, in).
      rank: Rank of the change.
    """
    a = jax.random.normal(key, (rank, shape[1])) * np.float32(shape[1] ** -0.5)
    return Adapter(a, jnp.zeros((shape[0], rank)))


def clipped(gradients: list[jax.Array]) -> list[jax.Array]:
    """Return gradients scaled down where their norm, of all together, is above `CLIP`.

    Args:
      gradients: Gradients of all trained arrays.
    """
    clip = optax.clip_by_global_norm(CLIP)
    new: list[jax.Array] = clip.update(gradients, clip.init(gradients))[0]
    return new
