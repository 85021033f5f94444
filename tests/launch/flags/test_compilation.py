"""The folder of compiled programs: what a second process finds in it, and what it may cost."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from launch.flags.compilation import compilation_cache, default_folder, trim
from models.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[3]
EVALUATION = ["--eval_data=embedded", "--eval_length=16", "--eval_windows=2", "--mesh=data=1"]
CALIBRATION = ["--calibration=embedded", "--calibration_samples=2", "--calibration_length=16"]
MODEL = "--model=embedded:tiny-llama"


def launch(command: str, cache: pathlib.Path, *flags: str, **environment: str) -> str:
    """Run a command in a process of its own, whose programs the environment has no folder for."""
    chosen = {n: v for n, v in os.environ.items() if not n.startswith("JAX_COMPILATION_CACHE")}
    settings = [sys.executable, "-m", command, *flags]
    done = subprocess.run(
        settings,
        env=chosen | {"XDG_CACHE_HOME": str(cache)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def programs(folder: pathlib.Path) -> set[str]:
    """Names of the programs below a folder."""
    return {path.name for path in folder.rglob("*-cache")}


@pytest.mark.slow
def test_a_second_process_and_a_run_on_its_result_compile_nothing(tmp_path: pathlib.Path) -> None:
    """The pruned model has the shapes of the dense one; sparsity is data."""
    runs = [("embedded:tiny-llama", 0.5), ("embedded:tiny-llama", 0.6), (tmp_path / "out0", 0.7)]
    found = []
    for k, (model, sparsity) in enumerate(runs):
        settings = [
            f"--model={model}",
            f"--sparsity={sparsity}",
            f"--output={tmp_path / f'out{k}'}",
        ]
        launch("launch.prune", tmp_path, "--method=wanda", *CALIBRATION, *EVALUATION, *settings)
        found.append(programs(tmp_path / "topiary/programs"))
    assert len(found[0]) > 10
    assert found[1] == found[0] and found[2] == found[0]


@pytest.mark.slow
def test_off_and_a_folder_of_the_users_own_are_heeded(tmp_path: pathlib.Path) -> None:
    own, home = tmp_path / "own", tmp_path / "home"
    launch("launch.evaluate", home, MODEL, *EVALUATION, "--compilation_cache=off")
    assert not programs(home)
    launch("launch.evaluate", home, MODEL, *EVALUATION, f"--compilation_cache={own}")
    assert programs(own) and not programs(home)
    by_jax = str(tmp_path / "jax")
    settings = {"JAX_COMPILATION_CACHE_DIR": by_jax}
    launch("launch.evaluate", home, MODEL, *EVALUATION, **settings)
    assert pathlib.Path(by_jax).is_dir() and not programs(home)


@pytest.mark.slow
def test_a_damaged_program_is_compiled_again(tmp_path: pathlib.Path) -> None:
    launch("launch.evaluate", tmp_path, MODEL, *EVALUATION)
    for path in tmp_path.rglob("*-cache"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    launch("launch.evaluate", tmp_path, MODEL, *EVALUATION)


def test_the_programs_used_last_stay(tmp_path: pathlib.Path) -> None:
    for k in range(5):
        path = tmp_path / f"jit_f-{k}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (k, k))
    (tmp_path / "notes.txt").write_bytes(bytes(1000))
    trim(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "jit_f-3-cache",
        "jit_f-4-cache",
        "notes.txt",
    ]


def test_a_folder_that_cannot_be_written_is_refused_if_the_user_named_it(
    tmp_path: pathlib.Path,
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with (
        pytest.raises(InputError, match="no folder that can be written"),
        compilation_cache(str(file)),
    ):
        pass


def test_a_home_that_cannot_be_written_is_no_reason_not_to_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with compilation_cache(""):
            assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)


def test_the_setting_ends_with_the_command(tmp_path: pathlib.Path) -> None:
    before = dict(os.environ)
    folder = jax.config.values["jax_compilation_cache_dir"]
    with compilation_cache(str(tmp_path)):
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
    assert dict(os.environ) == before
    assert jax.config.values["jax_compilation_cache_dir"] == folder


def test_machines_of_another_kind_have_folders_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = default_folder()
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert default_folder() != here and default_folder().parent == here.parent
