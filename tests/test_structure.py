"""The shape of the code: imports flow one way, files and functions stay small."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEES = {  # which packages a package may import from
    "models": {"models"},
    "calibration": {"models", "calibration"},
    "pruning": {"models", "calibration", "pruning"},
    "eval": {"models", "eval"},
    "launch": {"models", "calibration", "pruning", "eval", "launch"},
}
PUBLIC = {"pruning/api.py": {"eval"}}  # the public face measures models, too
FILES = sorted(f for package in SEES for f in (ROOT / package).rglob("*.py"))


def package_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0]


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def trees() -> list[tuple[Path, ast.Module]]:
    return [(f, tree_of(f)) for f in FILES]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_flow_one_way(file: Path) -> None:
    for node in ast.walk(tree_of(file)):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            package = name.split(".")[0]
            allowed = SEES[package_of(file)] | PUBLIC.get(str(file.relative_to(ROOT)), set())
            assert package not in SEES or package in allowed, f"{file} imports {name}"


# What maths may import, besides the standard library and other cores.
CORE_MODULES = {
    "chex",
    "jax",
    "jax.numpy",
    "numpy",
    "optax",
    "scipy.optimize",
    "models.layers",
    "models.precision",
    "calibration.moments",
    "calibration.observers",
    "pruning.linalg",
}


def is_core(module: str) -> bool:
    return module.endswith("_core") or module in CORE_MODULES


@pytest.mark.parametrize(
    "file",
    [f for f in FILES if f.stem.endswith("_core") or f.stem == "linalg"],
    ids=lambda f: str(f.relative_to(ROOT)),
)
def test_cores_see_only_arrays(file: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            imported |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            # `from package import module` names a module of this repository.
            nested = (ROOT / (node.module or "").replace(".", "/")).is_dir()
            names = {f"{node.module}.{a.name}" for a in node.names}
            imported |= names if nested else {node.module or ""}
    standard = {m for m in imported if m.split(".")[0] in sys.stdlib_module_names}
    assert all(map(is_core, imported - standard)), imported - standard


def test_only_launch_knows_flags() -> None:
    for file, tree in trees():
        imported = {
            a.name
            for n in ast.walk(tree)
            if isinstance(n, ast.Import | ast.ImportFrom)
            for a in n.names
        } | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert package_of(file) == "launch" or not any(
            str(name).startswith("absl") for name in imported
        ), file


# Packages whose errors name settings and never flags; calibration and pruning are to follow.
WITHOUT_FLAGS = ("models", "calibration", "pruning", "eval")


def prose(tree: ast.Module) -> set[int]:
    """Return the ids of the nodes that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bodies = [n.body[0] for n in ast.walk(tree) if isinstance(n, owners) and n.body]
    return {id(first.value) for first in bodies if isinstance(first, ast.Expr)}


def test_library_code_writes_no_flags() -> None:
    for file, tree in trees():
        if package_of(file) not in WITHOUT_FLAGS:
            continue
        docstrings = prose(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                is_flag = re.search("--[a-zA-Z]", node.value)
                assert id(node) in docstrings or not is_flag, f"{file}:{node.lineno} {node.value!r}"


def test_no_method_names_a_family() -> None:
    for file in (ROOT / "pruning").rglob("*.py"):
        strings = {
            n.value
            for n in ast.walk(tree_of(file))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        assert not strings & {
            "llama",
            "opt",
            "q",
            "k",
            "v",
            "o",
            "up",
            "down",
            "gate",
            "fc1",
            "fc2",
        }, file


def test_files_and_functions_stay_small() -> None:
    for file, tree in trees():
        assert len(file.read_text().splitlines()) <= 350, file
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = (
                    node.end_lineno
                    - node.lineno
                    + 1
                    - len((ast.get_docstring(node) or "").splitlines())
                )
                assert length <= 50, f"{file}: {node.name} has {length} lines"


def test_what_is_public_has_a_docstring() -> None:
    for file, tree in trees():
        assert ast.get_docstring(tree), f"{file} has no docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file}: {node.name} has no docstring"
