"""Print a script that completes commands, flags and values in a shell: bash, zsh or fish."""

import importlib
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from launch.flags.suggest import one_of

if TYPE_CHECKING:
    from launch.flags.cli import Flags

NAME = "completion"  # the command that prints a script
SUMMARY = "Print a script that completes commands, flags and values: bash, zsh or fish."


class Values(NamedTuple):
    """Values of a flag that a shell can complete.

    Attributes:
      names: Values that have a name.
      files: Whether the value may be a path.
      several: Whether the value is a list separated by commas.
    """

    names: tuple[str, ...] = ()
    files: bool = False
    several: bool = False


class Flag(NamedTuple):
    """A flag as a shell completes it.

    Attributes:
      name: Its name without dashes.
      text: Its help.
      values: Its values; None if it takes none.
    """

    name: str
    text: str
    values: Values | None


class Command(NamedTuple):
    """A command as a shell completes it.

    Attributes:
      text: Its summary.
      flags: Its flags; a boolean one has its `no` form as well.
      takes_files: Whether it takes paths besides flags.
    """

    text: str
    flags: tuple[Flag, ...]
    takes_files: bool


Commands = Mapping[str, Command]


def describe(options: "Flags", text: str) -> Command:
    """Return what a shell can complete of a command.

    Args:
      options: The command's flags.
      text: Its summary.
    """
    flags = [Flag("flagfile", "file to read flags from", Values(files=True))]
    for name in (name for names in options.groups.values() for name in names):
        flag = options.values[name]
        if not flag.boolean:
            flags.append(Flag(name, flag.help, options.completions.get(name, Values())))
            continue
        flags.append(Flag(name, flag.help, None))
        if name not in ("help", "debug"):
            flags.append(Flag(f"no{name}", f"not: {flag.help}", None))
    return Command(text, tuple(flags), bool(options.positional))


def bash(commands: Commands) -> str:
    """Return the script for bash.

    Args:
      commands: The commands by name.
    """
    flags, values = [], []
    for name, command in commands.items():
        words = " ".join(f"--{f.name}" + ("" if f.values is None else "=") for f in command.flags)
        flags.append(f"        {name}) echo {shlex.quote(words)} ;;")
        taken = {f"--{f.name}": f.values for f in command.flags if f.values}
        if command.takes_files:
            taken["-"] = Values(files=True)
        for flag, own in taken.items():
            words = " ".join([*own.names, *["/"] * own.files, *[","] * own.several])
            if words:
                values.append(f"        {name}:{flag}) echo {shlex.quote(words)} ;;")
    names = " ".join([*commands, NAME])
    return _script("bash", flags="\n".join(flags), values="\n".join(values), commands=names)


def zsh(commands: Commands) -> str:
    """Return the script for zsh.

    Args:
      commands: The commands by name.
    """
    summaries = {name: c.text for name, c in commands.items()} | {NAME: SUMMARY}
    lines = [
        f"        {shlex.quote(f'{name}:{_colons(text)}')}" for name, text in summaries.items()
    ]
    cases = []
    for name, command in commands.items():
        specs = [_zsh_flag(flag) for flag in command.flags]
        if command.takes_files:
            specs.append("*:path:_files")
        words = " \\\n            ".join(map(shlex.quote, specs))
        cases.append(f"        {name}) _arguments \\\n            {words} ;;")
    cases.append(f"        {NAME}) compadd -- {' '.join(SHELLS)} ;;")
    return _script("zsh", commands="\n".join(lines), cases="\n".join(cases))


def _zsh_flag(flag: Flag) -> str:
    """Return a flag in the form that `_arguments` takes."""
    text = "".join(f"\\{c}" if c in "\\[]" else c for c in flag.text)
    if flag.values is None:
        return f"--{flag.name}[{text}]"
    names = " ".join(map(_colons, flag.values.names))
    kinds = f"{int(flag.values.files)} {int(flag.values.several)}"
    # The space before the function keeps zsh from adding arguments of its own.
    return f"--{flag.name}=[{text}]:value: _topiary_value {kinds} {names}".rstrip()


def _colons(text: str) -> str:
    """Return a text for zsh, which separates fields by colons."""
    return text.replace(":", "\\:")


def fish(commands: Commands) -> str:
    """Return the script for fish.

    Args:
      commands: The commands by name.
    """
    lines = ["# Completion of topiary for fish: topiary completion fish | source", ""]
    lines.append("complete -c topiary -f")
    summaries = {name: c.text for name, c in commands.items()} | {NAME: SUMMARY}
    for name, text in summaries.items():
        lines.append(_fish("__fish_use_subcommand", "-a", name, "-d", text))
    for name, command in commands.items():
        condition = f"__fish_seen_subcommand_from {name}"
        if command.takes_files:
            lines.append(_fish(condition, "-F"))
        for flag in command.flags:
            words = ["-l", flag.name, "-d", flag.text]
            if flag.values is not None:
                words += ["-r", "-F" if flag.values.files else "-f"]
                words += ["-a", " ".join(flag.values.names)] if flag.values.names else []
            lines.append(_fish(condition, *words))
    lines.append(_fish(f"__fish_seen_subcommand_from {NAME}", "-a", " ".join(SHELLS)))
    return "\n".join(lines) + "\n"


def _fish(condition: str, *words: str) -> str:
    """Return a completion that holds under a condition."""
    # fish's quotes take a backslash before a quote or a backslash, and no other escape.
    quoted = ("'" + w.replace("\\", "\\\\").replace("'", "\\'") + "'" for w in (condition, *words))
    return f"complete -c topiary -n {' '.join(quoted)}"


def _script(shell: str, **parts: str) -> str:
    """Return a script of `shells/` with its parts filled in."""
    text = (pathlib.Path(__file__).parent / "shells" / f"topiary.{shell}").read_text("utf-8")
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def all_commands(summaries: Mapping[str, str]) -> Commands:
    """Return what a shell can complete of every command.

    Args:
      summaries: Every command with its summary.
    """
    return {
        name: describe(importlib.import_module(f"launch.{name}").options(), text)
        for name, text in summaries.items()
    }


SHELLS: dict[str, Callable[[Commands], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def main(argv: Sequence[str], summaries: Mapping[str, str]) -> int:
    """Print the script of a shell.

    Args:
      argv: Name of the shell.
      summaries: Every command with its summary.

    Returns:
      The exit code.
    """
    if len(argv) != 1 or argv[0] not in SHELLS:
        name = argv[0] if argv else ""
        print(f"error: {NAME} needs a shell: {one_of(name, SHELLS)}", file=sys.stderr)
        return 2
    print(SHELLS[argv[0]](all_commands(summaries)), end="")
    return 0
