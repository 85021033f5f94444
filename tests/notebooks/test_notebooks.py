"""Notebooks run offline and without torch, and their stored outputs are those of a run."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("nbclient", reason="needs the slowtest extra")

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("inspect_pytrees", "method_zoo")
LARGEST = 350_000  # bytes: pages open quickly, and the history stays small
# Relative: other versions of JAX round differently; one swapped weight shows in the third digit.
TOLERANCE = 0.03

# The first cell of a test's kernel: warnings are errors, torch is missing, the network is closed.
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
# treescope looks at every name of NumPy, and NumPy 2.5 deprecates this one.
warnings.filterwarnings("ignore", "The chararray class", DeprecationWarning)
sys.meta_path.insert(0, NoTorch)
socket.socket.connect = socket.getaddrinfo = refuse
"""
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,_]*(?:\.\d*)?(?:e[+-]?\d+)?")

every_notebook = pytest.mark.parametrize("name", NAMES)


def stored(name: str) -> NotebookNode:
    """Return the notebook as the repository has it."""
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells with code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_text(output: NotebookNode) -> str:
    """Return printed text, or the plain form of a displayed object."""
    return output.text if output.output_type == "stream" else output.data["text/plain"]


def cell_text(cell: NotebookNode) -> str:
    """Return all outputs of a cell as one text; a stream may come in any number of pieces."""
    return "".join(output_text(output) for output in cell.outputs)


def output_types(cell: NotebookNode) -> list[set[str]]:
    """Return the MIME types of each displayed object, then the names of all streams."""
    displayed = [
        set(o.data) for o in cell.outputs if o.output_type in ("display_data", "execute_result")
    ]
    streams = {o.name for o in cell.outputs if o.output_type == "stream"}
    return [*displayed, streams]


def executed(name: str) -> NotebookNode:
    """Run a copy of the notebook in a new kernel with one device, and return it."""
    notebook = stored(name)
    for cell in code_cells(notebook):
        cell.outputs = []
        cell.execution_count = None
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # A reader has one device and all optimizations, so that the figures are the stored ones.
    removed = {"XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "PYTEST_CURRENT_TEST"}
    environment = {k: v for k, v in os.environ.items() if k not in removed}
    environment["PYTHONPATH"] = path
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
    """Return the text without numbers, and without spaces, which align the numbers."""
    return "".join(NUMBER.sub("#", text).split())


def numbers(text: str) -> np.ndarray:
    """Return the numbers in a text [n]."""
    digits = [re.sub("[,_]", "", number) for number in NUMBER.findall(text)]
    return np.array([float(d) for d in digits])


def test_every_notebook_is_tested() -> None:
    assert {f.stem for f in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@every_notebook
def test_a_run_gives_the_stored_outputs(name: str) -> None:
    fresh = executed(name)
    for new, old in zip(code_cells(fresh), code_cells(stored(name)), strict=True):
        assert output_types(new) == output_types(old), old.source
        assert words(cell_text(new)) == words(cell_text(old)), old.source
        np.testing.assert_allclose(
            numbers(cell_text(new)),
            numbers(cell_text(old)),
            rtol=TOLERANCE,
            atol=1e-3,
            err_msg=old.source,
        )


@every_notebook
def test_the_stored_outputs_are_of_one_run_from_top_to_bottom(name: str) -> None:
    notebook = stored(name)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(
        range(1, len(code_cells(notebook)) + 1)
    )
    for cell in code_cells(notebook):
        assert cell.outputs, cell.source
        assert all(o.output_type != "error" and o.get("name") != "stderr" for o in cell.outputs), (
            cell.source
        )
        assert "execution" not in cell.metadata, "times of a run: execute with record_timing=False"


@every_notebook
def test_the_file_is_small_and_has_no_paths_of_a_machine(name: str) -> None:
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size <= LARGEST
    notebook = stored(name)
    text = "\n".join(
        [cell.source for cell in notebook.cells]
        + [cell_text(cell) for cell in code_cells(notebook)]
        + [str(notebook.metadata)]
    )
    assert not re.search(
        r"(?<![\w.])/(home|root|tmp|Users|opt|usr|work|mnt|var)/|[A-Z]:\\| at 0x[0-9a-f]+", text
    )


@every_notebook
def test_treescope_views_have_a_text_for_readers_without_scripts(name: str) -> None:
    for cell in code_cells(stored(name)):
        for output in cell.outputs:
            page = output.get("data", {}).get("text/html", "")
            if "<script" in page:
                visible = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
                assert "jax.Array" in visible or "Slot(" in visible, cell.source


@every_notebook
@pytest.mark.skipif(
    not shutil.which("ruff", path=str(pathlib.Path(sys.executable).parent)),
    reason="needs ruff: pip install -e '.[dev]'",
)
@pytest.mark.parametrize("command", ["check", "format --check"])
def test_the_code_passes_ruff(name: str, command: str) -> None:
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", f"notebooks/{name}.ipynb"]
    run = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
