"""Damaged files, flags, data and journals end with one line of error, or with a right result."""

import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
from fuzz import seeds
from fuzz.cases import KINDS, Case, config, data, flag_file, flags, gguf, index, make_case, weights
from fuzz.server import judge
from safetensors.numpy import save_file

from launch import prune
from launch.flags.cli import run
from launch.flags.common import open_model
from launch.run.measure import read_calibration, tokenizer_of
from reference.processes import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
QUICK = (config, data, flag_file, flags, gguf, index, weights)  # kinds without a run of their own


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The sound files."""
    pytest.importorskip("gguf")
    root = tmp_path_factory.mktemp("fuzz") / "seeds"
    seeds.write_seeds(root)
    return root


def read(values: dict[str, object]) -> None:
    """Read a model and its calibration windows, as a run does first."""
    checkpoint = open_model(str(values["model"]), "float32")
    list(checkpoint.model.blocks)
    keys = ("calibration", "calibration_samples", "calibration_length", "seed")
    read_calibration(*(values[key] for key in keys), checkpoint, tokenizer_of(checkpoint))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.__name__)
def test_damaged_input_is_read_or_refused_in_one_line(
    kind: object,
    sound: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fuzz.cases.KINDS", {kind: 1.0})
    codes = []
    for number in range(12):
        case = make_case(number, sound, tmp_path / str(number))
        code = run(prune.options(), read, case.argv)
        end = judge(case._replace(command="read"), code, 0.0, capsys.readouterr().err)
        assert not end.problem, (number, end)
        codes.append(code)
    assert 2 in codes


def test_a_number_always_gives_the_same_case(sound: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def content(work: pathlib.Path) -> dict[str, bytes]:
        files = {str(p.relative_to(work)): p for p in work.rglob("*") if p.is_file()}
        return {n: p.read_bytes().replace(bytes(work), b"") for n, p in sorted(files.items())}

    (sound / ".out.unfinished").mkdir(exist_ok=True)
    (sound / ".out.unfinished" / "x").write_bytes(b"x")
    for number in range(20):
        first, second = (make_case(number, sound, tmp_path / f"{k}{number}") for k in "ab")
        assert first.about.replace(f"a{number}", f"b{number}") == second.about
        assert content(tmp_path / f"a{number}") == content(tmp_path / f"b{number}")


def test_every_kind_of_damage_is_a_case(sound: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (sound / ".out.unfinished").mkdir(exist_ok=True)
    (sound / ".out.unfinished" / "x").write_bytes(b"x")
    for kind in KINDS:
        work = tmp_path / kind.__name__
        work.mkdir()
        command, argv = kind(random.Random(0), sound, work)
        assert command in ("prune", "plan", "evaluate") and argv


@pytest.mark.parametrize(
    ("code", "stderr", "problem"),
    [
        (2, "note\nerror: x: y\n", ""),
        (2, "error: x\nmore\n", "not one line of error"),
        (2, "error: x\nerror: y\n", "not one line of error"),
        (2, "", "not one line of error"),
        (1, "Traceback (most recent call last):\nKeyError: 1\n", "traceback: KeyError: 1"),
        (-9, "", "hang"),
        (-11, "", "exit -11"),
        (0, "", "no report"),
    ],
)
def test_the_judge_finds_what_is_wrong(
    code: int, stderr: str, problem: str, tmp_path: pathlib.Path
) -> None:
    case = Case("prune", [f"--output={tmp_path / 'out'}"], tmp_path / "out", "", False)
    assert judge(case, code, 1.0, stderr).problem == problem


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "weight", "said", "excused"),
    [
        ("llama", 1.0, "cannot load it (ValueError: x)", False),
        ("zebra", 1.0, "cannot load it (ValueError: x)", True),
        ("zebra", 1.0, "cannot load it (KeyError: x)", False),
        ("llama", 1.0, "largest difference of the logits 3", False),
        ("zebra", 1.0, "largest difference of the logits 3", False),
        ("llama", 1e30, "largest difference of the logits 3", True),
    ],
)
def test_the_judge_excuses_what_transformers_refuses_in_the_source_too(
    model_type: str, weight: float, said: str, excused: bool, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("transformers")
    for name in ("model", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"w": np.full(3, weight, np.float32)}, tmp_path / "out" / "model.safetensors")
    report = {
        "checks": {"topiary": True, "transformers": False},
        "load_back": {"topiary": "", "transformers": said},
    }
    (tmp_path / "out" / "pruning_report.json").write_text(json.dumps(report))
    argv = [f"--model={tmp_path / 'model'}", "--output=elsewhere", "--output=out"]
    problem = judge(Case("prune", argv, tmp_path / "first", "", False), 0, 1.0, "").problem
    assert problem == ("" if excused else f"transformers: {said}")


@pytest.mark.slow
def test_a_larger_sample_ends_well() -> None:
    """Run another hundred than those that the head of run.py names."""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment = os.environ | paths | {"XLA_FLAGS": xla_flags(1)}
    argv = [sys.executable, ROOT / "tests/fuzz/run.py", "--first=100000", "--inputs=100"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_sound_files_are_read(sound: pathlib.Path) -> None:
    """Damage to files that are refused as they are would show nothing."""
    want = None
    for name in ("llama", "sharded", "msgpack", "bin", "model.gguf"):
        if name == "bin" and not (sound / "bin" / "pytorch_model.bin").is_file():
            continue
        checkpoint = open_model(str(sound / name), "float32")
        up = np.asarray(checkpoint.model.blocks[1].up.w)
        want = up if want is None else want
        np.testing.assert_array_equal(up, want)
        tokenizer = tokenizer_of(checkpoint)
        for data_file in sorted(sound.glob("texts.*")):
            read_calibration(str(data_file), 4, 12, 0, checkpoint, tokenizer)
