"""Rotary settings of a GGUF file as transformers' `rope_parameters`."""

import math
from typing import Any

import numpy as np

from models.checkpoint.gguf_fields import REMEDY, Settings
from models.checkpoint.gguf_file import lazy
from models.checkpoint.gguf_names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from models.errors import InputError
from models.untrusted import shown


def read_rope(settings: Settings, rotated: int, context: int) -> dict[str, Any]:
    """Read the rotary settings.

    Args:
      settings: Settings of the file.
      rotated: Rotated channels of a head.
      context: The longest text in tokens.

    Returns:
      Contents of `rope_parameters`.

    Raises:
      InputError: The scaling is not known.
    """
    theta = {"rope_theta": settings.number("rope.freq_base", 10000.0)}
    tensors = settings.file.tensors
    if LONG_FACTORS in tensors or SHORT_FACTORS in tensors:
        # The factors tell: Phi-3's files do not name the kind of scaling.
        return theta | _longrope(settings, context)
    kind = settings.get("rope.scaling.type") or "linear"
    # Older files say scale_linear instead of scaling.factor.
    older = settings.number("rope.scale_linear", 0.0, least=0.0)
    factor = settings.number("rope.scaling.factor", older, least=0.0)
    # llama.cpp reads a factor of 0 as unscaled.
    is_scaled = kind != "none" and factor not in (0.0, 1.0)
    if kind not in ("none", "linear", "yarn") or (is_scaled and ROPE_FACTORS in tensors):
        raise InputError(
            f"{settings.file.path}: rotary scaling {shown(kind)} is not read from GGUF, only "
            "linear, yarn, longrope or LLaMA 3's",
            REMEDY,
        )
    if ROPE_FACTORS in tensors:
        return _stored_factors(settings, theta["rope_theta"], rotated)
    if not is_scaled:
        return theta | {"rope_type": "default"}
    if kind == "linear":
        return theta | {"rope_type": "linear", "factor": factor}
    return theta | _yarn(settings, factor, context)


def _yarn(settings: Settings, factor: float, context: int) -> dict[str, Any]:
    """Return the fields of YaRN's scaling."""
    fields: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": settings.count(
            "rope.scaling.original_context_length", context
        ),
        "beta_fast": settings.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": settings.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    # The converter copies the checkpoint's own factor; llama.cpp multiplies its usual one.
    own = settings.optional_number("rope.scaling.yarn_attn_factor")
    times = settings.number("rope.scaling.attn_factor", 1.0)
    if own is None and times != 1.0:
        own = times * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return fields if own is None else fields | {"attention_factor": own}


def _longrope(settings: Settings, context: int) -> dict[str, Any]:
    """Return the fields of LongRoPE's scaling."""
    return {
        "rope_type": "longrope",
        "short_factor": _factors(settings, SHORT_FACTORS),
        "long_factor": _factors(settings, LONG_FACTORS),
        "original_max_position_embeddings": settings.count(
            "rope.scaling.original_context_length", context
        ),
        "attention_factor": settings.number("rope.scaling.attn_factor", 1.0),
    }


def _factors(settings: Settings, name: str) -> list[float]:
    """Return a tensor of factors; InputError if the file has none."""
    stored = settings.file.tensors.get(name)
    if stored is None or len(stored.shape) != 1:
        raise InputError(
            f"{settings.file.path} holds no list {name}, which longrope needs", "download it again"
        )
    values = lazy(settings.file.path, name, stored).load()
    # The shortest decimals of the same float32, as a configuration says them.
    return [float(str(np.float32(v))) for v in values]


def _stored_factors(settings: Settings, theta: float, rotated: int) -> dict[str, Any]:
    """Return the fields of LLaMA 3's scaling, of which the file holds the factors alone."""
    file = settings.file
    factors = lazy(file.path, ROPE_FACTORS, file.tensors[ROPE_FACTORS]).load().astype(np.float64)
    # Stored in float32, a factor of 1 may be a little below.
    plausible = factors.shape == (rotated // 2,) and 0.999 < factors.min() <= factors.max() < 1e9
    scaled = _llama3(factors, theta) if plausible else None
    if scaled is None:
        raise InputError(f"{file.path}: {ROPE_FACTORS} is not LLaMA 3's rotary scaling", REMEDY)
    return {"rope_theta": theta, **scaled}


def _llama3(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Recover LLaMA 3's scaling from the factors [d/2] that divide the rotary frequencies.

    With λ the wavelength, the factor is 1 / ((1 - s)/f + s), s = (L/λ - low) / (high - low) clipped
    to [0, 1]. Where 0 < s < 1, s is a straight line in 1/λ, which gives L/low and high/low. Every
    published model has low = 1.

    Source: transformers' `_compute_llama3_parameters`.

    Args:
      factors: Factors of 1 and above, float64 [d/2].
      theta: Base of the frequencies.

    Returns:
      Fields of `rope_parameters`; None if the factors are of another scaling.
    """
    # Factors of one scale nothing.
    if np.allclose(factors, 1):
        return {"rope_type": "default"}
    inverse_waves = theta ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # 1/λ
    scale = factors.max()
    smooth = (1 / factors - 1 / scale) / (1 - 1 / scale)
    inner = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if inner.sum() < 2:
        # Two points are needed to find the line.
        return None
    slope, intercept = np.polyfit(inverse_waves[inner], smooth[inner], 1)
    # An intercept next to 0 would stand for frequencies without bound.
    if slope <= 0 or intercept >= -1e-6:
        return None
    high = round(1 - 1 / intercept, 2)
    length = round(slope * (high - 1))
    # Both were rounded to what a configuration would say; the factors must follow from them.
    line = np.clip((length * inverse_waves - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / ((1 - line) / scale + line), factors, rtol=1e-3):
        return None
    return {
        "rope_type": "llama3",
        "factor": round(float(scale), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(high),
        "original_max_position_embeddings": length,
    }
