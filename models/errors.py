"""The exception for bad input."""

import re
from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """Report bad input that the user can mend: a setting, a file, a checkpoint, data.

    Commands print the message as `error: <message>` and exit with code 2. Any other exception that
    escapes is a defect of the program and keeps its traceback.

    Library code names settings as arguments are named, never as flags. Inside `reason` and `remedy`
    a setting stands in backticks, as in "leave `pattern` out"; a command shows it as a flag. A
    boolean setting to be switched off has the prefix "no", as in `noresume`.

    Attributes:
      reason: What is wrong, a clause that continues "field=value" where there is a field.
      remedy: What the user can do about it; empty if the reason says it.
      field: Name of the setting at fault; empty if the input is not a setting.
      value: The setting's value as the user gave it; None to leave it out of the message.
    """

    def __init__(
        self, reason: str, remedy: str = "", *, field: str = "", value: Any = None
    ) -> None:
        self.reason, self.remedy, self.field, self.value = reason, remedy, field, value
        super().__init__(self.message())

    def message(self, name: Callable[[str], str] = str) -> str:
        """Return the message on one line.

        Args:
          name: Maps the name of a setting to what the reader knows it by, such as a flag.
        """
        subject = name(self.field) if self.field else ""
        if self.field and self.value is not None:
            subject += f"={self.value}"
        text = " ".join(filter(None, (subject, self.reason)))
        text += f": {self.remedy}" if self.remedy else ""
        # Only single words in backticks are settings; commands and code keep theirs.
        return re.sub(r"`(\w+)`", lambda match: name(match[1]), text)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
