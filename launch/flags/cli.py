"""Parse flags in groups, print a short help, and show errors as one line with exit code 2."""

import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from launch.flags import streams
from launch.flags.compilation import FLAG, compilation_cache
from launch.flags.completion import Values
from launch.flags.flagfiles import FileFlagValues
from launch.flags.suggest import closest, one_of
from launch.flags.termination import Terminated, raise_on_termination
from launch.report.downloads import download
from models.checkpoint.hub_client import reporting
from models.costs import is_out_of_memory
from models.errors import InputError
from models.host_memory import keep_freed_memory
from models.precision import AUTO, check_single_precision, matmul_type
from models.untrusted import MOST, has_surrogates

OUT_OF_MEMORY = "out of memory: give fewer or shorter windows, a smaller batch, or a smaller model"
LONGEST_MESSAGE = 1500  # characters of an error; a damaged file can make it quote anything
_HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")


class _NumberParser(flags.FloatParser):
    """absl's parser of numbers, with an answer to percentages."""

    def convert(self, argument: Any) -> Any:
        """Convert an argument to a number, as absl calls it."""
        try:
            return super().convert(argument)
        except ValueError:
            text = str(argument).strip()
            if text.endswith("%") and text[:-1].strip().isdecimal():
                raise ValueError(f"did you mean {int(text[:-1]) / 100:g}?") from None
            raise


class Flags:
    """The flags of one command, in the groups in which `--help` shows them.

    Every command has its own set, so importing two commands does not clash. absl adds `--flagfile`,
    which nests and may hold `#` comments; later flags win over earlier ones.

    Args:
      command: Name of the command's module, such as "launch.prune".
      doc: Description for the help.
      names: Key under which `parse` returns arguments that are not flags; empty if the command
        takes none.

    Attributes:
      program: The command as the user called it; empty for `python -m` and the module.
      completions: What a shell can complete, by flag.
      positional: Key of the arguments that are not flags; empty if the command takes none.
    """

    def __init__(self, command: str, doc: str, names: str = "") -> None:
        self.command = command
        self.doc = doc
        self.values = FileFlagValues()
        self.program = ""
        self.groups: dict[str, list[str]] = {}
        self.completions: dict[str, Values] = {}
        self.positional = names
        self._preset_flag = ""
        self._presets: Mapping[str, Mapping[str, Any]] = {}
        self._group = ""
        self.group("General")
        self.boolean("debug", False, "show the traceback of an error")
        self.boolean("help", False, "show this help")

    def group(self, title: str) -> None:
        """Put the flags defined from here on into a group.

        Args:
          title: The group's title.
        """
        self._group = title
        self.groups.setdefault(title, [])

    def _define(
        self, define: Callable[..., Any], name: str, default: Any, text: str, **options: Any
    ) -> None:
        """Define a flag with absl and put it into the current group."""
        define(name=name, default=default, help=text, flag_values=self.values, **options)
        self.groups[self._group].append(name)

    def string(
        self,
        name: str,
        default: str | None,
        text: str,
        *,
        names: Collection[str] = (),
        files: bool = False,
        several: bool = False,
    ) -> None:
        """Define a text flag.

        Args:
          name: The flag's name.
          default: Value if the flag is not given.
          text: The help.
          names: Values that a shell completes.
          files: Whether a shell completes paths too; without names it does.
          several: Whether the value is a list separated by commas.
        """
        self._define(flags.DEFINE_string, name, default, text)
        self.completions[name] = Values(tuple(names), files or not names, several)

    def integer(self, name: str, default: int, text: str, least: int = 0, most: int = MOST) -> None:
        """Define an integer flag.

        Args:
          name: The flag's name.
          default: Value if the flag is not given.
          text: The help.
          least: Least value that is allowed.
          most: Greatest value that is allowed.
        """
        self._define(flags.DEFINE_integer, name, default, text, lower_bound=least, upper_bound=most)

    def number(self, name: str, default: float | None, text: str) -> None:
        """Define a floating-point flag.

        Args:
          name: The flag's name.
          default: Value if the flag is not given.
          text: The help.
        """
        self._define(flags.DEFINE, name, default, text, parser=_NumberParser())

    def boolean(self, name: str, default: bool, text: str) -> None:
        """Define a flag that is on, or off in its `--no` form.

        Args:
          name: The flag's name.
          default: Value if the flag is not given.
          text: The help.
        """
        self._define(flags.DEFINE_boolean, name, default, text)

    def choice(self, name: str, default: str, choices: Sequence[str], text: str) -> None:
        """Define a text flag with a fixed list of values.

        Args:
          name: The flag's name.
          default: Value if the flag is not given.
          choices: The values.
          text: The help.
        """
        self._define(flags.DEFINE_enum, name, default, text, enum_values=list(choices))
        self.completions[name] = Values(tuple(choices))

    def presets(self, name: str, presets: Mapping[str, Mapping[str, Any]], text: str) -> None:
        """Define the flag whose value sets the defaults of other flags; a command has at most one.

        A flag that is given wins over the preset, before or after it. A preset's values for flags
        that this command does not have are ignored.

        Args:
          name: The flag's name.
          presets: Values of the other flags, by preset and flag.
          text: The help.
        """
        self.string(name, "", text, names=presets)
        self._preset_flag = name
        self._presets = presets

    def _names(self) -> Iterable[str]:
        """Yield the names of the command's own flags, without those of absl."""
        for names in self.groups.values():
            yield from names

    def _defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults of all flags under the preset that the values choose."""
        chosen = values.get(self._preset_flag)
        preset: Mapping[str, Any] = {}
        if chosen:
            if chosen not in self._presets:
                raise InputError(
                    "is unknown",
                    one_of(chosen, self._presets),
                    field=self._preset_flag,
                    value=chosen,
                )
            preset = self._presets[chosen]
        return {name: preset.get(name, self.values[name].default) for name in self._names()}

    def shown(self, name: str) -> str:
        """Return a setting's name as the user knows it: as a flag if this command has it.

        Args:
          name: The setting; with the prefix "no" if a boolean one is to be switched off.
        """
        names = (name, name.removeprefix("no"))
        is_flag = name == "flagfile" or any(n in self.values for n in names)
        return f"--{name}" if is_flag else name

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Parse a command line.

        Args:
          argv: Arguments without the program's name.

        Returns:
          The values of all flags by name.

        Raises:
          InputError: A flag is unknown, a value is wrong, or an argument is not a flag.
        """
        hint = f"{self.program or f'python -m {self.command}'} --help lists the flags"
        try:
            rest = self.values([self.command, *argv])
        except InputError:
            raise
        except flags.UnrecognizedFlagError as e:
            match = closest(e.flagname, self._names())
            remedy = f"did you mean --{match}? ({hint})" if match else hint
            raise InputError(f"--{e.flagname} is no flag", remedy) from None
        except (flags.Error, ValueError) as e:  # ValueError: --noflag=value
            raise InputError(f"{str(e).splitlines()[0]} ({hint})") from None
        if len(rest) > 1 and not self.positional:
            raise InputError(f"{rest[1]!r} is not a flag", f"write --name=value ({hint})")
        given = {n: self.values[n].value for n in self._names() if self.values[n].present}
        _check_text([*given.values(), *rest])
        values = self._defaults(given) | given
        if self.positional:
            values[self.positional] = rest[1:]
        return values

    def given(self, values: Mapping[str, Any]) -> list[str]:
        """Return the arguments that set the given values, without those equal to the defaults.

        Args:
          values: Values of the flags by name, the preset included.
        """
        arguments = []
        for name, default in self._defaults(values).items():
            if name not in values or values[name] == default:
                continue
            value = values[name]
            if isinstance(value, bool):
                arguments.append(f"--{name}" if value else f"--no{name}")
            else:
                arguments.append(f"--{name}={value}")
        return arguments

    def help(self) -> str:
        """Return the help: the description, then the flags by group, each with its default."""
        lines = [self.doc.strip(), ""]
        for title, names in self.groups.items():
            lines.append(f"{title}:")
            for name in names:
                flag = self.values[name]
                default = "" if flag.default in (None, "") else f" (default: {flag.default})"
                lines.append(f"  --{name:<22} {flag.help}{default}")
            lines.append("")
        lines.append("--flagfile=FILE reads flags from a file, one a line; later flags win.")
        return "\n".join(lines)


def _check_text(values: Iterable[Any]) -> None:
    """Check that texts can be written: the system passes on bytes that are no UTF-8 as halves."""
    wrong = next((v for v in values if isinstance(v, str) and has_surrogates(v)), None)
    if wrong is not None:
        raise InputError(f"{wrong!a} is not UTF-8 text", "give names in UTF-8")


def frozen(kind: Any, values: Mapping[str, Any]) -> Any:
    """Make a dataclass of the parsed flags that are its fields.

    Args:
      kind: The dataclass.
      values: Values of the flags by name.
    """
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)})


def run(
    options: Flags, main: Callable[[dict[str, Any]], int | None], argv: Sequence[str] | None = None
) -> int:
    """Parse the flags, run a command and return its exit code.

    An InputError becomes one line `error: ...` and code 2, with a traceback only under `--debug`.
    Any other exception is a defect of the program and keeps its traceback.

    Args:
      options: The command's flags.
      main: The command: values of the flags -> exit code, None for 0.
      argv: Arguments; None: those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    streams.prepare()
    raise_on_termination()
    keep_freed_memory()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if any(argument in _HELP for argument in argv):
            print(options.help())
            code = 0
        else:
            values = options.parse(argv)
            check_single_precision()
            cache = compilation_cache(values.get(FLAG))
            with reporting(download), cache, matmul_type(values.get("matmul", AUTO)):
                code = main(values) or 0
        sys.stdout.flush()
        return code
    except InputError as e:
        # Read from the arguments: the flags themselves may be what is wrong.
        if any(argument in ("--debug", "--debug=true") for argument in argv):
            traceback.print_exc()
        print(f"error: {_one_line(e.message(options.shown))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not streams.reader_left():
            raise
        return 128 + signal.SIGPIPE
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        if any(argument in ("--debug", "--debug=true") for argument in argv):
            traceback.print_exc()
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except Terminated:
        print("error: stopped by SIGTERM", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _one_line(message: str) -> str:
    """Return a message on one line of bounded length, without a terminal's control characters."""
    text = " ".join(message.split())
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE // 2]} … {text[-LONGEST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
