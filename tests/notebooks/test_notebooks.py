"""Notebooks run from top to bottom, offline and without torch, and what is stored with them is what they give."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("inspect_pytrees", "method_zoo")
LARGEST = 350_000  # bytes: pages open quickly, and the history stays small
NEAR = 0.03  # relative: other versions of JAX round otherwise, and one swapped weight shows in the third digit

# Run first in the kernel: any warning is an error, torch is not there, and nothing connects to anything.
STRICT = """
import socket, sys, warnings

class NoTorch:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("a notebook must not need torch")

def refuse(*arguments):
    raise OSError("a notebook must not use the network")

warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="ipykernel")  # the kernel's own
warnings.filterwarnings("ignore", "The chararray class", DeprecationWarning)  # treescope looks at every name of NumPy, 2.5 deprecates one
sys.meta_path.insert(0, NoTorch)
socket.socket.connect = socket.getaddrinfo = refuse
"""
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,_]*(?:\.\d*)?(?:e[+-]?\d+)?")

every_notebook = pytest.mark.parametrize("name", NAMES)


def stored(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(output: NotebookNode) -> str:
    """An output as text: what is printed, or the plain form of what is displayed."""
    return output.text if output.output_type == "stream" else output.data["text/plain"]


def printed(cell: NotebookNode) -> str:
    """What a cell shows as text; a stream may come in any number of pieces."""
    return "".join(shown(output) for output in cell.outputs)


def kinds(cell: NotebookNode) -> list[set[str]]:
    """The forms of a cell's outputs, one set for all that is printed."""
    found = [
        set(o.data) for o in cell.outputs if o.output_type in ("display_data", "execute_result")
    ]
    return [*found, {o.name for o in cell.outputs if o.output_type == "stream"}]


def executed(name: str) -> NotebookNode:
    """A copy, run in a kernel of its own as a reader would on one device."""
    notebook = stored(name)
    for cell in cells(notebook):
        cell.outputs, cell.execution_count = [], None
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    hidden = {"XLA_FLAGS", "PYTEST_CURRENT_TEST"}
    environment: Mapping[str, str] = {k: v for k, v in os.environ.items() if k not in hidden} | {
        "PYTHONPATH": path
    }
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    client.execute(env=environment)
    del notebook.cells[0]
    return notebook


def words(text: str) -> str:
    """The text without its numbers and its spacing, which their lengths decide."""
    return "".join(NUMBER.sub("#", text).split())


def numbers(text: str) -> np.ndarray:
    return np.array(
        [float(re.sub("[,_]", "", found.rstrip(","))) for found in NUMBER.findall(text)]
    )


def test_all_of_them_are_tested() -> None:
    assert {f.stem for f in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@every_notebook
def test_runs_and_gives_what_is_stored(name: str) -> None:
    fresh = executed(name)
    for new, old in zip(cells(fresh), cells(stored(name)), strict=True):
        assert kinds(new) == kinds(old), old.source
        assert words(printed(new)) == words(printed(old)), old.source
        np.testing.assert_allclose(
            numbers(printed(new)), numbers(printed(old)), rtol=NEAR, atol=1e-3, err_msg=old.source
        )


@every_notebook
def test_is_stored_as_run_from_top_to_bottom(name: str) -> None:
    notebook = stored(name)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in cells(notebook)] == list(
        range(1, len(cells(notebook)) + 1)
    )
    for cell in cells(notebook):
        assert cell.outputs, cell.source
        assert all(o.output_type != "error" and o.get("name") != "stderr" for o in cell.outputs), (
            cell.source
        )
        assert "execution" not in cell.metadata, "times of a run: execute with record_timing=False"


@every_notebook
def test_is_small_and_tells_nothing_of_a_machine(name: str) -> None:
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size <= LARGEST
    notebook = stored(name)
    text = "\n".join(
        [cell.source for cell in notebook.cells]
        + [printed(cell) for cell in cells(notebook)]
        + [str(notebook.metadata)]
    )
    assert not re.search(
        r"(?<![\w.])/(home|root|tmp|Users|opt|usr|work|mnt|var)/|[A-Z]:\\| at 0x[0-9a-f]+", text
    )


@every_notebook
def test_views_need_no_scripts(name: str) -> None:
    """What a reader without scripts sees of treescope's views is their text."""
    for cell in cells(stored(name)):
        for output in cell.outputs:
            page = output.get("data", {}).get("text/html", "")
            if "<script" in page:
                visible = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
                assert "jax.Array" in visible or "Slot(" in visible, cell.source


@every_notebook
@pytest.mark.skipif(
    not shutil.which("ruff", path=str(pathlib.Path(sys.executable).parent)),
    reason="needs ruff: pip install topiary[dev]",
)
@pytest.mark.parametrize("command", ["check", "format --check"])
def test_is_written_as_the_code_is(name: str, command: str) -> None:
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", f"notebooks/{name}.ipynb"]
    run = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
