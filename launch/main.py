"""Run a command of Topiary: `topiary prune ...` is `python -m launch.prune ...`."""

import ast
import importlib
import pathlib
import sys
from collections.abc import Sequence

from launch import __version__
from launch.flags import completion
from launch.flags.suggest import closest

HELP = """Prune large language models after training.

  topiary COMMAND --flag=value ...   is python -m launch.COMMAND --flag=value ...
  topiary COMMAND --help             lists the command's flags
  topiary --version                  prints the version

Commands:
"""


def commands() -> dict[str, str]:
    """Return every command with its summary, the first line of its module's docstring.

    The modules are read, not imported: JAX takes seconds.
    """
    summaries = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "options" for node in tree.body):
            summaries[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return summaries


def help_text() -> str:
    """Return the help, with every command on a line."""
    lines = commands() | {completion.NAME: completion.SUMMARY}
    return HELP + "\n".join(f"  {name:<12} {text}" for name, text in lines.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names.

    Args:
      argv: Arguments; None: those of the process.

    Returns:
      The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("", "help", "--help", "-h"):
        print(help_text())
        return 0 if name else 2
    if name == "--version":
        print(f"topiary {__version__}")
        return 0
    known = commands()
    if name == completion.NAME:
        return completion.main(rest, known)
    if name not in known:
        match = closest(name, [*known, completion.NAME])
        hint = f"did you mean {match}? " if match else ""
        print(f"error: {name!r} is no command: {hint}topiary --help lists them", file=sys.stderr)
        return 2
    from launch.flags import cli  # here, so that the help need not wait for JAX

    module = importlib.import_module(f"launch.{name}")
    options = module.options()
    options.program = f"topiary {name}"
    return cli.run(options, module.main, rest)


if __name__ == "__main__":
    sys.exit(main())
