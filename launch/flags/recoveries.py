"""Parse the value of --recover."""

from typing import NamedTuple

from launch.flags import calls
from models.errors import InputError
from pruning.recovery import RECOVERIES
from pruning.recovery.types import Recovery

NONE = "none"


class Call(NamedTuple):
    """A recovery as the user wrote it.

    Attributes:
      text: The call.
      recovery: The recovery.
    """

    text: str
    recovery: Recovery


def parse_recover(text: str, draws: int = 1) -> tuple[Call, ...]:
    """Parse calls joined with `+`, to be done in order.

    Args:
      text: Such as `blocks(steps=32)+distill`; `none` or empty for no recovery.
      draws: Number of calibration draws; those behind the first are not recovered.

    Raises:
      InputError: It is of no such form, names an unknown recovery or parameter, or there are
        several draws.
    """
    if text in ("", NONE):
        return ()
    if draws > 1:
        raise InputError(
            "repeats the pruning alone, without its recovery",
            "leave it or `recover` out",
            field="calibration_draws",
            value=draws,
        )
    parts = calls.split_sum("recover", text)
    return tuple(Call(part, calls.build("recover", part, RECOVERIES)) for part in parts)
