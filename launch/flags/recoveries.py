"""Parse the value of --recover."""

from typing import NamedTuple

from launch.flags import calls
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


def parse_recover(text: str) -> tuple[Call, ...]:
    """Parse calls joined with `+`, to be done in order.

    Args:
      text: Such as `blocks(steps=32)+distill`; `none` or empty for no recovery.

    Raises:
      InputError: It is of no such form, or names an unknown recovery or parameter.
    """
    if text in ("", NONE):
        return ()
    parts = calls.split_sum("recover", text)
    return tuple(Call(part, calls.build("recover", part, RECOVERIES)) for part in parts)
