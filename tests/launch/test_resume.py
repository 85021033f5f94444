"""A run that is killed at any moment and repeated gives the same bytes."""

import functools
import importlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from launch.run import code
from models.checkpoint import tensors, writer
from models.checkpoint.writer import save
from models.init import init_model
from pruning.methods import METHODS
from reference.prune_runs import call, report_of, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_samples")]

BASE = dict(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=24,
)
LLAMA = BASE | dict(
    model_type="llama", intermediate_size=24, num_key_value_heads=2, initializer_range=0.3
)
OPT = BASE | dict(model_type="opt", ffn_dim=24, word_embed_proj_dim=16, init_std=0.3)
RUNS = {
    "wanda": ("llama", ["--method=wanda", "--sparsity=0.5"]),
    "magnitude": ("opt", ["--method=magnitude", "--sparsity=0.5"]),
    "sparsegpt with dsnot": ("llama", ["--method=sparsegpt", "--sparsity=0.5", "--refine=dsnot"]),
    "sparsegpt with neuroal": (
        "llama",
        ["--method=sparsegpt", "--sparsity=0.5", "--allocation=neuroal(samples=2)"],
    ),
    "wanda with neuroal official": (
        "opt",
        ["--method=wanda", "--sparsity=0.5", '--allocation=neuroal(samples=2, variant="official")'],
    ),
    "wanda with owl": ("opt", ["--method=wanda", "--sparsity=0.5", "--allocation=owl"]),
    "wanda with evopress": (
        "opt",
        [
            "--method=wanda",
            "--sparsity=0.5",
            "--allocation=evopress(generations=2, offspring=3, survivors=(), windows=(2,))",
        ],
    ),
    "admm": ("llama", ["--method=admm", "--sparsity=0.5"]),
    "sparsellm": ("opt", ["--method=sparsellm(iterations=1)", "--sparsity=0.5"]),
    "llmrank": ("llama", ['--method=llmrank(repair="refit")', "--sparsity=0.5"]),
    "rows": ("opt", ['--method=llmrank(units="rows")', "--sparsity=0.5"]),
    "flap": ("opt", ["--method=flap", "--sparsity=0.3"]),
    "flap official": ("llama", ['--method=flap(variant="official")', "--sparsity=0.5"]),
    "wanda_sp": (
        "llama",
        ['--method=wanda_sp(scope="global", repair="bias")', "--sparsity=0.4", "--layout=padded"],
    ),
    "sleb": ("llama", ["--method=sleb(blocks=2)"]),
    "finalists": ("llama", ["--method=sleb(blocks=1, finalists=2)"]),
    "flatten": (
        "llama",
        ['--method=sleb(blocks=2, search="similarity", repair="flatten")'],
    ),
}


class Killed(BaseException):
    """An exception that the program must not catch."""


class Fuse:
    """Raises `Killed` at the n-th call of the functions it guards; only counts if n is 0."""

    def __init__(self, n: int):
        self.n, self.calls = n, 0

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.n:
                raise Killed
            return function(*args, **kwargs)

        return guarded


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("inputs")
    for config in (LLAMA, OPT):
        save(root / config["model_type"], init_model(config, jax.random.key(1)), config, root)
    rng = np.random.default_rng(0)
    np.save(root / "calib.npy", rng.integers(0, 64, (4, 16), np.int32))
    np.save(root / "eval.npy", rng.integers(0, 64, (2, 16), np.int32))
    return root


def argv(inputs: pathlib.Path, output: pathlib.Path, model: str, args: list[str]) -> list[str]:
    data = [
        f"--calibration={inputs / 'calib.npy'}",
        f"--eval_data={inputs / 'eval.npy'}",
        "--calibration_batch=2",
        "--mesh=data=1",
    ]
    return [f"--model={inputs / model}", f"--output={output}", *data, *args]


def guard_writes(fuse: Fuse, m: pytest.MonkeyPatch) -> None:
    """Guard the functions that write to the disk, or run just before or after it."""
    m.setattr("calibration.journal.os.replace", fuse.guard(os.replace))
    m.setattr("calibration.journal.shutil", types.SimpleNamespace(rmtree=fuse.guard(shutil.rmtree)))
    for module, name in ((tensors, "save_file"), (writer, "write_json")):
        m.setattr(module, name, fuse.guard(getattr(module, name)))
    for name in ("put", "mark"):
        m.setattr(writer.Writer, name, fuse.guard(getattr(writer.Writer, name)))
    m.setattr("calibration.journal.SAVE_TIME_FRACTION", 1e9)  # save after every block


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_anywhere_gives_the_same_bytes(
    name: str, inputs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Killed at several moments from the first durable write to the last."""
    model, args = RUNS[name]
    with pytest.MonkeyPatch.context() as m:
        guard_writes(count := Fuse(0), m)
        assert call(argv(inputs, tmp_path / "whole", model, args)) == 0
    want = weights(tmp_path / "whole")
    record = (tmp_path / "whole" / "pruning.json").read_bytes()
    for n in range(1, count.calls + 1, max(1, count.calls // 3)):
        with pytest.MonkeyPatch.context() as m:
            guard_writes(Fuse(n), m)
            with pytest.raises(Killed):
                call(argv(inputs, tmp_path / "cut", model, args))
        if not (
            tmp_path / "cut"
        ).exists():  # what is there is complete, if the last act of the run was cut short
            assert call(argv(inputs, tmp_path / "cut", model, args)) == 0
        got = weights(tmp_path / "cut")
        assert got.keys() == want.keys()
        for tensor, x in want.items():
            np.testing.assert_array_equal(got[tensor], x, err_msg=f"killed at {n}: {tensor}")
        assert (tmp_path / "cut" / "pruning.json").read_bytes() == record
        for part in ("perplexity", "agreement"):
            assert report_of(tmp_path / "cut")[part] == report_of(tmp_path / "whole")[part]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]
        shutil.rmtree(tmp_path / "cut")


def interrupted(
    inputs: pathlib.Path, output: pathlib.Path, n: int = 22, method: str = "wanda"
) -> list[str]:
    """Kill a run in the middle; return its command."""
    args = [*argv(inputs, output, *RUNS["wanda"]), f"--method={method}"]
    with pytest.MonkeyPatch.context() as m:
        guard_writes(Fuse(n), m)
        with pytest.raises(Killed):
            call(args)
    assert (output.parent / f".{output.name}.unfinished" / "journal" / "journal.json").is_file()
    return args


def test_finished_blocks_are_not_pruned_again(
    inputs: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = interrupted(inputs, tmp_path / "out")
    guard_writes(count := Fuse(0), monkeypatch)
    monkeypatch.setattr(writer.Writer, "put", (puts := Fuse(0)).guard(writer.Writer.put))
    assert call(args) == 0
    assert 0 < puts.calls < 4 and count.calls
    assert f"{4 - puts.calls} blocks are finished" in capsys.readouterr().err
    assert "interrupted" in (tmp_path / "out" / "pruning_report.json").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--sparsity=0.6"], "another --sparsity (0.5, now 0.6)"),
        (["--pattern=2:4"], 'another --pattern ("unstructured", now "2:4")'),
        (["--seed=1"], "another --seed (0, now 1)"),
        (["--dtype=bfloat16"], "another --dtype"),
    ],
)
def test_another_setting_is_refused(
    change: list[str],
    said: str,
    inputs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = interrupted(inputs, tmp_path / "out")
    assert call([*args, *change]) == 2
    assert said in capsys.readouterr().err
    assert call(args) == 0
    assert "blocks are finished" in capsys.readouterr().err


OWN = "from pruning.methods import METHODS\n\n\ndef mine():\n    return METHODS['wanda']()\n"


def test_changed_code_is_refused(
    inputs: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "a_method_of_mine.py"
    file.write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "mine", importlib.import_module("a_method_of_mine").mine)
    args = interrupted(inputs, tmp_path / "out", method="mine")
    file.write_text(OWN + "# better\n")
    assert call(args) == 2
    assert "another code of --method" in capsys.readouterr().err
    file.write_text(OWN)
    with monkeypatch.context() as m:
        m.setattr(code, "_package", lambda name: f"changed {name}")
        assert call(args) == 2
    assert "another code of pruning, code of calibration" in capsys.readouterr().err
    assert call(args) == 0
    assert "blocks are finished" in capsys.readouterr().err


def test_the_digest_of_a_package_covers_every_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_package" / "part").mkdir(parents=True)
    seen = []
    for name, text in (
        ("__init__.py", ""),
        ("part/a.py", "a = 1"),
        ("part/a.py", "a = 2"),
        ("part/b.py", ""),
    ):
        (tmp_path / "a_package" / name).write_text(text)
        code._package.cache_clear()
        seen.append(code._package("a_package"))
    code._package.cache_clear()
    assert len(set(seen)) == len(seen)


def test_another_model_and_other_tokens_are_refused(
    inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("llama", "calib.npy", "eval.npy"):
        shutil.copytree(inputs, tmp_path / "mine")
        args = interrupted(tmp_path / "mine", tmp_path / "out")
        if name == "llama":
            save(tmp_path / "mine" / "llama", init_model(LLAMA, jax.random.key(2)), LLAMA, inputs)
        else:
            np.save(tmp_path / "mine" / name, np.load(inputs / name)[::-1])
        assert call(args) == 2
        said = {
            "llama": "another weights",
            "calib.npy": "another --calibration tokens",
            "eval.npy": "another --eval_data tokens",
        }
        assert said[name] in capsys.readouterr().err
        assert call([*args, "--noresume"]) == 0
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        shutil.rmtree(tmp_path / "mine")


def test_a_flipped_bit_is_named_and_costs_its_step(
    inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every file that an interrupted run goes on from."""
    assert call(argv(inputs, tmp_path / "whole", *RUNS["wanda"])) == 0
    want = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    want = {name: data for name, data in want.items() if "report" not in name}
    args = interrupted(inputs, tmp_path / "out")
    work = tmp_path / ".out.unfinished"
    shutil.copytree(work, tmp_path / "kept")
    files = sorted(p.relative_to(work) for p in work.rglob("*") if p.is_file())
    index = json.loads((work / "journal" / "journal.json").read_text())["content"]
    counted = [work / "journal" / key for key in index["sha256"]]
    for file in files:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", work)
        data = bytearray((work / file).read_bytes())
        data[len(data) // 2] ^= 4
        (work / file).write_bytes(data)
        assert call(args) == 0
        named = [os.path.relpath(c, work / "journal") for c in counted if _holds(c, work / file)]
        if file.name.startswith("journal."):
            named = [file.name]
        if not named:
            continue  # written after the last commit, and written again
        err, report = capsys.readouterr().err, report_of(tmp_path / "out")
        sentence = f"{named[0].removeprefix('../')} is damaged or missing"
        assert f"warning: unfinished run: {sentence}" in err, file
        assert any(sentence in warning for warning in report["warnings"]), file
        for name, content in want.items():
            assert (tmp_path / "out" / name).read_bytes() == content, (file, name)
    assert len(files) >= 6


def _holds(counted: pathlib.Path, file: pathlib.Path) -> bool:
    """Return whether a file that counts is this one, or the directory that it lies in."""
    return pathlib.Path(os.path.normpath(counted)) in (file, *file.parents)


def test_sleb_with_several_draws_resumes_between_them(
    inputs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks are put before the second draw, and come again from the finished search."""
    text = ["--calibration=embedded", "--calibration_samples=2", "--calibration_length=16"]
    args = [
        "--model=embedded:tiny-llama",
        f"--output={tmp_path / 'out'}",
        *text,
        *[
            "--eval_length=16",
            "--eval_windows=1",
            "--calibration_draws=2",
            "--method=sleb(blocks=1)",
        ],
    ]

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as m:
        m.setattr("launch.run.draws.record", killed)
        with pytest.raises(Killed):
            call(args)
    assert call(args) == 0


def test_a_run_resumes_after_a_full_disk(
    inputs: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls, save_file = 0, tensors.save_file

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    args = argv(inputs, tmp_path / "out", *RUNS["wanda"])
    with monkeypatch.context() as m:
        m.setattr("models.checkpoint.tensors.save_file", full)
        m.setattr("calibration.journal.SAVE_TIME_FRACTION", 1e9)
        assert call(args) == 2
    assert "no space left" in capsys.readouterr().err
    assert call(args) == 0
    assert "blocks are finished" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [1500, 12000, 30000])
def test_a_limit_on_the_size_of_files_is_an_error_and_the_run_goes_on(
    limit: int, inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The journal, a block's file or the whole model's is too large."""
    args = argv(inputs, tmp_path / "out", *RUNS["wanda"])
    # Compiled programs go to files as well, so all of them are made before.
    assert call(argv(inputs, tmp_path / "whole", *RUNS["wanda"])) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert call(args) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "a file is larger than the file system or" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call(args) == 0
    model = "model.safetensors"
    assert (tmp_path / "out" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


@pytest.mark.parametrize("place", ["mount", "mount/out"])
def test_a_disk_that_fills_is_an_error_and_the_run_goes_on(
    place: str, inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=90k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        args = argv(inputs, tmp_path / place, *RUNS["wanda"])
        assert call(args) == 2
        assert "no space left" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,size=9m", str(mount)], check=True)
        assert call(args) == 0
        assert (tmp_path / place / "report.html").is_file()
        assert [p.name for p in mount.glob(".*")] == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_two_runs_do_not_write_one_place(
    inputs: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = argv(inputs, tmp_path / "out", *RUNS["wanda"])

    def meanwhile(*_: Any) -> Any:
        assert call(args) == 2
        raise Killed

    monkeypatch.setattr("launch.run.measure.evaluate", meanwhile)
    with pytest.raises(Killed):
        call(args)
    assert "another run is writing it" in capsys.readouterr().err


def test_a_run_resumes_after_sigterm(inputs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The exit code is that of the signal; the same command continues."""
    args = argv(inputs, tmp_path / "out", *RUNS["sparsegpt with neuroal"])
    code = (
        "import os, signal, sys\nfrom launch import prune\nfrom launch.flags.cli import run\n"
        "from models.checkpoint.writer import Writer\n"
        "put = Writer.put\n"
        "def terminated(self, i, block):\n    put(self, i, block)\n"
        "    if i == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "Writer.put = terminated\nsys.exit(run(prune.options(), prune.main, sys.argv[1:]))"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert (
        done.stderr.strip().splitlines()[-1] == "error: stopped by SIGTERM"
        and "Traceback" not in done.stderr
    )
    assert call(args) == 0
