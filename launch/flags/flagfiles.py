"""Flag files, read as `absl` does, but with every fault in them named."""

from collections.abc import Sequence

from absl import flags

from models.errors import InputError
from models.untrusted import UserFile, user_path

DEEPEST = 50  # files that name one another


class FileFlagValues(flags.FlagValues):
    """Flag values whose flag files may be of any content, depth and kind.

    `absl` itself waits for ever at a pipe, and lets the faults of text and of recursion through.
    """

    def read_flags_from_files(self, argv: Sequence[str], force_gnu: bool = True) -> list[str]:
        """Put the content of each flag file in the place where the file is named.

        Args:
          argv: Arguments without the program's name.
          force_gnu: Without effect; a flag file is read wherever it is named.

        Returns:
          Arguments without flag files.

        Raises:
          InputError: A file cannot be read, is nested too deeply, or has no name.
        """
        # A stack rather than recursion: of each open list the arguments that are left, last first.
        waiting = [list(reversed(argv))]
        arguments: list[str] = []
        while waiting:
            if not waiting[-1]:
                waiting.pop()
                continue
            argument = waiting[-1].pop()
            if argument == "--":
                return [*arguments, argument, *reversed(waiting[-1])]
            flag, equals, name = argument.partition("=")
            if flag not in ("--flagfile", "-flagfile"):
                arguments.append(argument)
                continue
            if not equals and not waiting[-1]:
                raise InputError("is missing its file", "write --flagfile=FILE", field="flagfile")
            name = (name if equals else waiting[-1].pop()).strip()
            if len(waiting) > DEEPEST:
                raise InputError(
                    f"is nested deeper than {DEEPEST} files",
                    "put the flags into one",
                    field="flagfile",
                    value=name,
                )
            waiting.append(_lines(name))
        return arguments


def _lines(name: str) -> list[str]:
    """Return the arguments of a flag file, last first; a file without a name has none."""
    if not name:
        return []
    file = UserFile(user_path(name, "flagfile"), "flagfile", "write one flag a line")
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [line for line in reversed(lines) if line and not line.startswith(("#", "//"))]
