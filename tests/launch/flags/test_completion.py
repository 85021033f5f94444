"""The shells themselves complete commands, flags, values and files from the printed scripts."""

import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch import main
from launch.flags import completion
from launch.flags.cli import Flags

# What is typed, and the words that complete its last one.
CASES: dict[str, set[str]] = {
    "topiary pr": {"pretrain", "prune"},
    "topiary comp": {"compare", "completion"},
    "topiary prune --spa": {"--sparsity"},
    "topiary prune --nor": {"--noresume"},
    "topiary prune --method=wa": {"wanda", "wanda_sp"},
    "topiary prune --method wa": {"wanda", "wanda_sp"},
    "topiary prune --dtype=b": {"bfloat16"},
    "topiary prune --model=embedded:tiny-o": {"embedded:tiny-opt"},
    "topiary prune --calibration=te": {"text.jsonl"},
    "topiary prune --calibration=wi": {"wikitext2"},
    "topiary prune --model=x --refi": {"--refine"},
    "topiary compare out": {"out-a", "out-b"},
    "topiary completion z": {"zsh"},
    "topiary prune --seed=1": set(),
    "topiary prune --method=zebra": set(),
}
LISTS = {
    "topiary evaluate --eval_data=c4,wi": {"c4,wikitext2"},
    "topiary prune --calibration=c4:0.5,wi": {"c4:0.5,wikitext2"},
}


def make() -> Flags:
    f = Flags("launch.example", "", names="directories")
    f.string("model", None, "a 'model': [a] path\\", names=("embedded:x",), files=True)
    f.string("data", None, "texts", names=("c4", "ptb"), several=True)
    f.string("json", None, "file")
    f.integer("count", 1, "how many")
    f.boolean("fast", True, "hurry")
    f.choice("kind", "a", ["a", "b"], "which")
    return f


def test_what_a_shell_is_told_of_a_command() -> None:
    command = completion.describe(make(), "Do it.")
    flags = {flag.name: flag.values for flag in command.flags}
    assert command.takes_files and command.text == "Do it."
    assert flags["fast"] is None and flags["nofast"] is None
    assert "nohelp" not in flags and "nodebug" not in flags
    assert flags["kind"] == (("a", "b"), False, False)
    assert flags["data"] == (("c4", "ptb"), False, True)
    assert flags["model"] == (("embedded:x",), True, False)
    assert flags["json"] == flags["flagfile"] == ((), True, False)
    assert flags["count"] == ((), False, False)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_has_every_part_and_no_marker(shell: str) -> None:
    script = completion.SHELLS[shell]({"do": completion.describe(make(), "Do: it.")})
    assert "@" not in script.replace('"$@"', "").replace("[@]", "")
    assert all(word in script for word in ("nofast", "count", "embedded", "completion", "ptb"))


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the script of each shell, and with files to complete."""
    root = tmp_path_factory.mktemp("shells")
    commands = completion.all_commands(main.commands())
    for name, script in completion.SHELLS.items():
        (root / f"topiary.{name}").write_text(script(commands), encoding="utf-8")
    (root / "files").mkdir()
    for name in ("out-a", "out-b"):
        (root / "files" / name).mkdir()
    (root / "files" / "text.jsonl").touch()
    return root


def shell(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}")
    return path


BASH = """
source {script}
complete_line() {{
    COMP_LINE=$1 COMP_POINT=${{#1}}
    read -ra COMP_WORDS <<< "${{1//=/ = }}"
    COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
    _topiary
    printf '%s\\n' "${{COMPREPLY[*]}}"
}}
"""


@pytest.mark.slow
def test_bash(scripts: Path) -> None:
    lines = {**CASES, **LISTS}
    program = BASH.format(script=scripts / "topiary.bash")
    program += "".join(f"complete_line '{line}'\n" for line in lines)
    for breaks in (" \t\n=:", " \t\n"):  # with and without the characters that end bash's words
        done = subprocess.run(
            [shell("bash"), "-c", f"COMP_WORDBREAKS=$'{breaks}'\n{program}"],
            cwd=scripts / "files",
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        for (line, expected), answer in zip(lines.items(), done.stdout.splitlines(), strict=True):
            assert _whole(line, answer.split(), "=:" in breaks) == expected, line


def _whole(line: str, answers: list[str], broken: bool) -> set[str]:
    """Return bash's answers as values: what it keeps of the word is put before them."""
    word = line.split()[-1]
    if broken:
        kept = word[: max(word.rfind("="), word.rfind(":")) + 1]
        answers = [kept + answer for answer in answers]
    return {answer.rpartition("=")[2] or answer.rstrip("=") for answer in answers}


@pytest.mark.slow
def test_fish(scripts: Path) -> None:
    for line, expected in CASES.items():
        done = subprocess.run(
            [shell("fish"), "-c", f"source {scripts}/topiary.fish; complete -C '{line}'"],
            cwd=scripts / "files",
            env=os.environ | {"HOME": str(scripts)},
            capture_output=True,
            text=True,
        )
        words = {text.partition("\t")[0].rpartition("=")[2] for text in done.stdout.splitlines()}
        assert {word.rstrip("/") for word in words} == expected, line


@pytest.mark.slow
def test_zsh(scripts: Path) -> None:
    typed = {line: words for line, words in {**CASES, **LISTS}.items() if len(words) == 1}
    assert _typed_in_zsh(scripts, typed) == {}


def _typed_in_zsh(scripts: Path, lines: Mapping[str, set[str]]) -> dict[str, str]:
    """Type lines with a tab behind each in zsh; return the screens that lack the completion."""
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        [shell("zsh"), "-f", "-i"],
        cwd=scripts / "files",
        env=os.environ | {"TERM": "xterm", "PS1": "> "},
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
    )
    os.close(side)

    def screen(wanted: str) -> str:
        seen, end = "", time.monotonic() + 20
        while wanted not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 65536).decode(errors="replace")
        return seen

    wrong = {}
    script = scripts / "topiary.zsh"
    load = f"autoload -U compinit; compinit -u -D; source {script}; echo re''ady\n"
    os.write(terminal, load.encode())
    screen("ready")
    for line, (word,) in lines.items():
        os.write(terminal, f"{line}\t".encode())
        flag, equals, _ = line.rpartition("=")
        seen = screen(f"{flag.split()[-1]}{equals}{word}" if equals else word)
        if word not in seen:
            wrong[line] = seen
        os.write(terminal, b"\x15")  # clears the line
    os.write(terminal, b"exit\n")
    process.wait(20)
    os.close(terminal)
    return wrong
