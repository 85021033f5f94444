"""Rotary positions: frequencies of every kind of scaling, and their application.

Letters: b batch, t positions, n query heads, k key-value heads, h head size, r rotated channels of
a head.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Settings of rotary positions.

    Attributes:
      theta: Base of the geometric series of wavelengths.
      kind: "default", "linear", "dynamic", "llama3", "yarn" or "longrope".
      factor: Ratio of the longest text after scaling to the longest before.
      max_positions: Length in tokens that the model was trained for. Dynamic scaling begins there;
        for llama3, yarn and longrope it is the length before scaling.
      low_freq_factor: Turns within `max_positions` below which llama3 scales a frequency fully.
      high_freq_factor: Turns above which llama3 leaves a frequency as it is.
      share: Share of a head's channels that are rotated, the first ones.
      attention_factor: Factor of the cosines and sines, of yarn and longrope.
      beta_fast: Turns within `max_positions` above which yarn leaves a frequency as it is.
      beta_slow: Turns below which yarn scales a frequency fully.
      truncate: True if yarn rounds the bounds between them to whole channels.
      short_factors: Divisor of each frequency in texts up to `max_positions`, of longrope.
      long_factors: Divisor of each frequency in longer texts, of longrope.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    max_positions: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    share: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def rotated(self, head_dim: int) -> int:
        """Return the number r of a head's channels that are rotated.

        Args:
          head_dim: Size h of a head.
        """
        return int(head_dim * self.share)


def inverse_frequencies(rope: Rope, head_dim: int, length: int) -> np.ndarray:
    """Compute the angles by which one position turns each pair of channels.

    Args:
      rope: Rotary settings.
      head_dim: Size of a head, h.
      length: Tokens in the text.

    Returns:
      Angles in radians, float32 [r/2].
    """
    theta, r = rope.theta, rope.rotated(head_dim)
    if rope.kind == "dynamic" and length > rope.max_positions:
        # Neural-tangent-kernel scaling: the base grows with the length, so that the lowest
        # frequency spans it.
        stretch = rope.factor * length / rope.max_positions - (rope.factor - 1)
        theta = theta * stretch ** (r / (r - 2))
    # float32 throughout, as in the models' own code: float64 gives other last digits.
    exponents = np.arange(0, r, 2, dtype=np.float32) / np.float32(r)
    wavelengths = np.power(np.float32(theta), exponents)
    if rope.kind == "longrope":
        divisors = rope.long_factors if length > rope.max_positions else rope.short_factors
        return (1.0 / (np.asarray(divisors, np.float32) * wavelengths)).astype(np.float32)
    f = (1.0 / wavelengths).astype(np.float32)
    if rope.kind == "linear":
        return f / np.float32(rope.factor)
    if rope.kind == "llama3":
        # Long wavelengths are slowed by `factor`, short ones kept, those between blended.
        turns = rope.max_positions * f / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        blend = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
        return (1 - blend) * f / np.float32(rope.factor) + blend * f
    if rope.kind == "yarn":
        slowed = _yarn_slowed(rope, r)
        return f / np.float32(rope.factor) * slowed + f * (1 - slowed)
    return f


def _yarn_slowed(rope: Rope, r: int) -> np.ndarray:
    """Compute how far yarn slows each frequency, 0 to 1, float32 [r/2].

    Source: Peng et al. 2023 (YaRN), section 3.2, over channels as in the released code.
    """

    def channel(turns: float) -> float:
        """Return the channel whose frequency makes so many turns within `max_positions`."""
        wavelength = rope.max_positions / (turns * 2 * math.pi)
        return r * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    # A ramp of no width would divide by zero.
    width = high - low or 0.001
    ramp = (np.arange(r // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    return np.clip(ramp, 0, 1)


# Cached, so that all blocks of a program share one pair of constants.
@functools.lru_cache(maxsize=16)
def _rotary_tables(
    rope: Rope, head_dim: int, length: int, positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute cosines and sines, float32 [positions r/2], in a text of a length."""
    at = np.arange(positions, dtype=np.float32)
    angle = at[:, None] * inverse_frequencies(rope, head_dim, length)[None, :]
    factor = np.float32(rope.attention_factor)
    return np.cos(angle) * factor, np.sin(angle) * factor


def apply_rotary(
    x: jax.Array, cos: jax.Array | np.ndarray, sin: jax.Array | np.ndarray
) -> jax.Array:
    """Rotate channels i and i + r/2 together, by the angle of their position.

    Channels from r on stay as they are.

    Args:
      x: Queries or keys, [b t n h].
      cos: Cosines of the angles, [t r/2].
      sin: Sines of the angles, [t r/2].

    Returns:
      Rotated queries or keys, [b t n h].
    """
    # In the model's dtype, as transformers does.
    cos, sin = (jnp.asarray(f, x.dtype)[None, :, None, :] for f in (cos, sin))
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def rotate(rope: Rope, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Apply rotary position embedding at positions 0..t-1, halves not interleaved.

    Source: Su et al. 2021.

    Args:
      rope: Rotary settings.
      q: Queries, [b t n h].
      k: Keys, [b t k h].

    Returns:
      Rotated queries and keys of the same shapes.
    """
    length = q.shape[1]
    tables = _rotary_tables(rope, q.shape[-1], length, length)
    return apply_rotary(q, *tables), apply_rotary(k, *tables)


@functools.lru_cache(maxsize=16)
def _frequencies_by_length(rope: Rope, head_dim: int, longest: int) -> np.ndarray:
    """Compute inverse frequencies, float32 [longest+1 r/2], of texts of every length."""
    return np.stack([inverse_frequencies(rope, head_dim, n) for n in range(longest + 1)])


def rotate_from(
    rope: Rope, q: jax.Array, k: jax.Array, start: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Apply rotary position embedding at positions start..start+t-1.

    Args:
      rope: Rotary settings.
      q: Queries, [b t n h].
      k: Keys, [b t k h].
      start: Position of the first token, int [], traced.
      capacity: Number of positions that the cache holds; none may lie beyond it.

    Returns:
      Rotated queries and keys of the same shapes.
    """
    head_dim, t = q.shape[-1], q.shape[1]
    if rope.kind == "dynamic":
        # All angles change with the text's length so far, start + t. Keys that were rotated
        # earlier stay as they are, as in transformers.
        f = jnp.asarray(_frequencies_by_length(rope, head_dim, capacity))[start + t]
        angle = (start + jnp.arange(t)).astype(jnp.float32)[:, None] * f[None, :]
        tables = jnp.cos(angle), jnp.sin(angle)
    else:
        # A slice of the table that `rotate` uses: both give the same bits.
        table = _rotary_tables(rope, head_dim, capacity, capacity)
        cos, sin = (jnp.asarray(x) for x in table)
        if rope.kind == "longrope":
            # All angles change once, beyond `max_positions`; `models.generate` begins a new cache
            # there, as transformers does.
            short = _rotary_tables(rope, head_dim, 1, capacity)
            is_long = start + t > rope.max_positions
            cos, sin = (jnp.where(is_long, x, y) for x, y in zip((cos, sin), short, strict=True))
        tables = (
            jax.lax.dynamic_slice_in_dim(cos, start, t),
            jax.lax.dynamic_slice_in_dim(sin, start, t),
        )
    return apply_rotary(q, *tables), apply_rotary(k, *tables)
