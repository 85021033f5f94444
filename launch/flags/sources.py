"""Parse the value of --calibration: sources, their shares, and the settings of `self`."""

from calibration.data import is_token_file
from calibration.generated import SelfText, self_text
from calibration.mixtures import SELF, Part, is_generated, parse_parts
from launch.flags import calls
from models.errors import InputError


def parse_calibration(text: str) -> tuple[Part, ...]:
    """Parse a source or a mix, with the settings of text that the model writes itself.

    Args:
      text: The flag's value.

    Raises:
      InputError: A part has no share or a wrong one, or `self` has wrong settings.
    """
    parts = parse_parts(text)
    for part in parts:
        if is_generated(part.source):
            self_settings(part.source)
    return parts


def self_settings(source: str) -> SelfText:
    """Return the settings that a call of `self` names.

    Args:
      source: Such as `self` or `self(temperature=0.8)`.

    Raises:
      InputError: A setting is unknown, has another type or is out of range.
    """
    settings: SelfText = calls.build("calibration", source, {SELF: self_text})
    return settings


def check_draws(count: int, source: str) -> None:
    """Check that several draws are not taken from a source without random windows.

    Args:
      count: Number of draws.
      source: Calibration source.

    Raises:
      InputError: They would be the same windows.
    """
    parts = parse_parts(source)
    if count > 1 and len(parts) == 1 and is_token_file(parts[0].source):
        raise InputError(
            f"would repeat the same windows, as {source} is taken whole",
            "leave it out, or give text to draw windows from",
            field="calibration_draws",
            value=count,
        )
