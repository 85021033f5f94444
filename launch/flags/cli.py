"""What every command shares: flags in groups, a short help, flag files, and errors as one line with exit code 2."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from models.errors import InputError


class Flags:
    """A command's own flags, in the groups in which `--help` shows them.

    Each command has its own set, so importing two commands does not clash. `--flagfile`, which nests and may hold `#` comments, comes
    with absl; later flags win over earlier ones.

    Args:
      names: what `parse` calls the arguments that are not flags; empty: there may be none.
    """

    def __init__(self, command: str, doc: str, names: str = ""):
        self.command, self.doc, self._names = command, doc, names
        self.values = flags.FlagValues()
        self.groups: dict[str, list[str]] = {}
        self._preset, self._presets = "", {}  # type: str, Mapping[str, Mapping[str, Any]]
        self._group = ""
        self.group("General")
        self.boolean("debug", False, "show the traceback of an error")
        self.boolean("help", False, "show this help")

    def group(self, title: str) -> None:
        """Flags defined from here on belong to the group `title`."""
        self._group = title
        self.groups.setdefault(title, [])

    def _define(
        self, define: Callable[..., Any], name: str, default: Any, text: str, **more: Any
    ) -> None:
        define(name=name, default=default, help=text, flag_values=self.values, **more)
        self.groups[self._group].append(name)

    def string(self, name: str, default: str | None, text: str) -> None:
        """A text flag; None when it is not given."""
        self._define(flags.DEFINE_string, name, default, text)

    def integer(self, name: str, default: int, text: str, least: int = 0) -> None:
        """An integer flag of at least `least`."""
        self._define(flags.DEFINE_integer, name, default, text, lower_bound=least)

    def number(self, name: str, default: float | None, text: str) -> None:
        """A floating-point flag."""
        self._define(flags.DEFINE_float, name, default, text)

    def boolean(self, name: str, default: bool, text: str) -> None:
        """A flag with a `--no` form."""
        self._define(flags.DEFINE_boolean, name, default, text)

    def choice(self, name: str, default: str, choices: Sequence[str], text: str) -> None:
        """A text flag with the values it may take."""
        self._define(flags.DEFINE_enum, name, default, text, enum_values=list(choices))

    def presets(self, name: str, known: Mapping[str, Mapping[str, Any]], text: str) -> None:
        """A flag whose values stand for values of other flags: by its value, then by flag. Flags that are given themselves win, wherever
        they stand; those that this command does not have are passed over. There is at most one such flag."""
        self.string(name, "", text)
        self._preset, self._presets = name, known

    def _defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The flags' values where they are not given; InputError for a preset that there is not."""
        chosen = values.get(self._preset)
        if chosen and chosen not in self._presets:
            raise InputError(
                f"--{self._preset}={chosen}: there is no such {self._preset}: there are {', '.join(self._presets)}"
            )
        preset = self._presets[chosen] if chosen else {}
        return {
            n: preset.get(n, self.values[n].default)
            for names in self.groups.values()
            for n in names
        }

    def shown(self, name: str) -> str:
        """Return a setting's name as the user knows it: a flag, where this command has one."""
        known = name in self.values or name.removeprefix("no") in self.values
        return f"--{name}" if known else name

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The values of all flags by name; InputError for an unknown flag, a wrong value, or anything that is not a flag."""
        try:
            rest = self.values([self.command, *argv])
        except (flags.Error, OSError) as e:
            raise InputError(
                f"{str(e).splitlines()[0]} (python -m {self.command} --help lists the flags)"
            ) from None
        if len(rest) > 1 and not self._names:
            raise InputError(
                f"{rest[1]!r} is not a flag: write --name=value (python -m {self.command} --help lists the flags)"
            )
        given = {
            n: self.values[n].value
            for names in self.groups.values()
            for n in names
            if self.values[n].present
        }
        found = self._defaults(given) | given
        return found | ({self._names: rest[1:]} if self._names else {})

    def given(self, values: dict[str, Any]) -> list[str]:
        """The flags whose values differ from the defaults, or from the preset's that is among them, as one would type them."""
        shown = [
            n
            for n, default in self._defaults(values).items()
            if n in values and values[n] != default
        ]
        return [
            f"--{'' if values[n] is not False else 'no'}{n}"
            + ("" if isinstance(values[n], bool) else f"={values[n]}")
            for n in shown
        ]

    def help(self) -> str:
        """The command, its flags by group, each with its default."""
        lines = [self.doc.strip(), ""]
        for title, names in self.groups.items():
            lines.append(f"{title}:")
            for name in names:
                flag = self.values[name]
                default = "" if flag.default in (None, "") else f" (default: {flag.default})"
                lines.append(f"  --{name:<22} {flag.help}{default}")
            lines.append("")
        return "\n".join(
            [*lines, "A file of flags, one a line, is read with --flagfile=FILE; later flags win."]
        )


def frozen(kind: Any, values: dict[str, Any]) -> Any:
    """The frozen dataclass `kind` made of the parsed flags that are its fields."""
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)})


class Terminated(BaseException):
    """SIGTERM came, as it does before a machine is taken away: unwind, keeping what is finished."""


def _terminated(number: int, frame: object) -> None:
    raise Terminated


@contextlib.contextmanager
def termination_deferred() -> Iterator[threading.Event]:
    """SIGTERM sets the event and does no more, for callers of libraries that no handler may raise through."""
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        _on_termination()


def _on_termination() -> None:
    if (
        threading.current_thread() is threading.main_thread()
    ):  # the only one that may say what signals do
        signal.signal(signal.SIGTERM, _terminated)


def run(
    options: Flags, main: Callable[[dict[str, Any]], int | None], argv: Sequence[str] | None = None
) -> int:
    """Parse, run `main(values)`, and return the exit code: main's own (None is 0), or 2 after one line `error: ...` for what the user can
    mend.

    A defect of ours keeps its traceback, and so does every error with `--debug`.
    """
    argv = sys.argv[1:] if argv is None else argv
    _on_termination()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if any(a in ("--help", "-h", "-help", "--helpfull", "--helpshort") for a in argv):
            print(options.help())
            return 0
        return main(options.parse(argv)) or 0
    except InputError as e:
        if any(a in ("--debug", "--debug=true") for a in argv):
            traceback.print_exc()
        print(f"error: {' '.join(e.message(options.shown).split())}", file=sys.stderr)
        return 2
    except Terminated:
        print("error: stopped by SIGTERM", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
