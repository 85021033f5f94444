"""`topiary COMMAND` is `python -m launch.COMMAND`, and its help is quick and complete."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch import __version__, main
from launch.flags import cli

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def programs() -> set[str]:
    """Return the modules of launch/ that can be run."""
    return {
        path.stem
        for path in (ROOT / "launch").glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text() and path.stem != "main"
    }


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in programs():
        tree = ast.parse((ROOT / "launch" / f"{name}.py").read_text())
        summary = (ast.get_docstring(tree) or "").splitlines()[0]
        assert f"  {name} " in said and summary.endswith(".") and summary in said
    assert set(main.commands()) == programs()


def test_every_command_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    for name in programs():
        assert main.main([name, "--help"]) == 0
        assert importlib.import_module(f"launch.{name}").options().help() in capsys.readouterr().out


def test_no_command_prints_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 2
    assert "Commands:" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"topiary {__version__}\n"
    assert __version__ == PROJECT["project"]["version"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["prnue"],
            "error: 'prnue' is no command: did you mean prune? topiary --help lists them\n",
        ),
        (["zebra"], "error: 'zebra' is no command: topiary --help lists them\n"),
        (
            ["prune", "--sparsty=1"],
            "error: --sparsty is no flag: did you mean --sparsity? "
            "(topiary prune --help lists the flags)\n",
        ),
        (["completion", "fisch"], "error: completion needs a shell: did you mean fish? "),
        (["completion"], "error: completion needs a shell: there are bash, zsh, fish\n"),
    ],
)
def test_a_wrong_word_is_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


def test_a_command_gets_the_rest_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "run", lambda *arguments: seen.append(arguments) or 7)
    assert main.main(["plan", "--model=x", "--json=y"]) == 7
    ((options, function, rest),) = seen
    plan = importlib.import_module("launch.plan")
    assert (options.command, options.program) == ("launch.plan", "topiary plan")
    assert function is plan.main and rest == ["--model=x", "--json=y"]


def test_the_package_has_every_folder_and_a_command_that_exists() -> None:
    module, _, name = PROJECT["project"]["scripts"]["topiary"].partition(":")
    assert getattr(importlib.import_module(module), name) is main.main
    settings = PROJECT["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in ("models", "calibration", "pruning", "eval", "launch")
        for path in (ROOT / top).rglob("*.py")
    }
    assert set(settings["packages"]) == folders
    for package, patterns in settings["package-data"].items():
        assert all(list((ROOT / package.replace(".", "/")).glob(p)) for p in patterns)
    shells = ROOT / "launch/flags/shells"
    assert {p.name for p in shells.iterdir()} == {"topiary.bash", "topiary.zsh"}


@pytest.mark.slow
def test_a_command_imports_nothing_large_that_its_run_may_not_use() -> None:
    large = {"datasets", "lm_eval", "matplotlib", "orbax", "pandas", "pyarrow", "scipy.optimize"}
    large |= {"torch", "transformers"}
    program = f"import sys, launch.prune; print(*sorted({large} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


@pytest.mark.slow
def test_help_does_not_import_jax() -> None:
    program = (
        "import sys; from launch.main import main; main(['--help']); "
        "sys.exit(bool({'jax', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    assert done.returncode == 0
