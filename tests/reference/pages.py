"""Code blocks and commands of the documentation's pages."""

import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = re.compile(r"python -m launch\.(\w+)")


def read(page: str) -> str:
    """Return the text of a page, named from the repository's root."""
    return (ROOT / page).read_text(encoding="utf-8")


def code(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language in a page; fail if it has none."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)
    assert blocks, f"{page} has no {language}"
    return blocks


def shell_commands(page: str) -> list[str]:
    """Return the commands of a page's bash blocks, one of each `&&` chain after the other."""
    lines = "\n".join(code(page, "bash")).replace("\\\n", " ").splitlines()
    chained = (part for line in lines for part in re.split(r"\s*&&\s*", _uncommented(line)))
    return [" ".join(part.split()) for part in chained if part.strip()]


def launch_commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every command `python -m launch.NAME FLAGS` of a page as NAME and its flags.

    Fenced, indented and inline code count, and so do comments of a flag file. Prose that names a
    command without flags is passed over. `...` and `$(...)` stand for more of the same.
    """
    text = re.sub(r"\\\n\s*(?:#\s*)?", " ", read(page))
    text = re.sub(r"`([^`\n]*)\n([^`\n]*)`", r"`\1 \2`", text)  # inline code over a line's end
    for line in text.splitlines():
        for match in LAUNCH.finditer(line):
            flags = _arguments(re.split(r"&&|`", line[match.end() :])[0])
            if flags:
                yield match[1], flags


def _arguments(text: str) -> list[str]:
    """Split the rest of a command into words, whatever it stands in."""
    text = re.sub(r"\$\([^)]*\)", "DIR", _uncommented(text))
    try:
        words = shlex.split(text)
    except ValueError:  # the command is itself quoted: its last quote is the outer one
        words = shlex.split(text.rpartition("'")[0])
    return [w for w in words if w != "..." and not w.endswith("=...")]


def _uncommented(line: str) -> str:
    """Return a line of shell without its comment."""
    return re.sub(r"(^|\s)#.*", "", line)
