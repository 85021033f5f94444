"""A run killed before any act on the disk is completed by the same command, to the same bytes.

Some acts are tried here, and every one with TOPIARY_EVERY_ACT=1.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reference.disk_acts import copy_tree, watched
from reference.prune_runs import call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_samples", "no_transformers"),
]

KINDS = {
    "weights": ["--method=wanda", "--sparsity=0.5"],
    "structured": ["--method=flap(structure='AL-AM')", "--sparsity=0.3", "--output_format=orbax"],
    "blocks": ["--method=sleb(blocks=2)"],
    "recovery": [
        "--method=wanda",
        "--sparsity=0.5",
        "--recover=blocks(steps=16,lr=0.03,batch=1)",
    ],
    "distillation": [
        "--method=wanda",
        "--sparsity=0.5",
        "--recover=distill(steps=2,batch=1,checkpoint_minutes=0,top_k=3)",
    ],
    "allocation": ["--method=wanda", "--sparsity=0.5", "--allocation=neuroal(samples=2)"],
}
# Acts at the end that are all tried: the final renames and removals, which are the same code for
# every kind.
LAST = {"weights": 24}
FEW = 6
ELSEWHERE = 6
EVERY_ACT = "TOPIARY_EVERY_ACT" in os.environ


def argv(inputs: Path, output: Path, kind: str) -> list[str]:
    return [
        f"--model={inputs / 'llama'}",
        f"--output={output}",
        f"--calibration={inputs / 'calib.npy'}",
        f"--eval_data={inputs / 'eval.npy'}",
        "--calibration_batch=2",
        "--mesh=data=1",
        *KINDS[kind],
    ]


def result(output: Path) -> dict[str, Any]:
    """Return the files of a result, but for the report, which has its times."""
    files: dict[str, Any] = {
        str(p.relative_to(output)): p.read_bytes()
        for p in sorted(output.rglob("*"))
        if p.is_file() and "report" not in p.name and "orbax" not in p.parts
    }
    # The report's second file: values from a journal have their names in another order.
    files["pruning_details.json"] = json.loads(files["pruning_details.json"])
    return files


def pictures(root: Path, album: Path, args: list[str]) -> list[Path]:
    """Run the command, and return a copy of `root` before each of its acts on the disk."""
    taken: list[Path] = []

    def take() -> None:
        copy_tree(root, album / str(len(taken)))
        taken.append(album / str(len(taken)))

    with watched(root, take):
        assert call(args) == 0
    return taken


def check_kills(
    args: list[str], output: Path, album: Path, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Repeat the command from the chosen pictures; return how many acts there were."""
    monkeypatch.setattr("calibration.journal.SAVE_TIME_FRACTION", 1e9)  # save after every block
    root = output.parent
    taken = pictures(root, album, args)
    want = result(output)
    beside = sorted(p.name for p in root.iterdir())
    for k in chosen(len(taken)):
        shutil.rmtree(root)
        copy_tree(taken[k], root)
        assert call(args) == 0, f"killed before act {k} of {len(taken)}"
        assert result(output) == want, f"killed before act {k} of {len(taken)}"
        assert sorted(p.name for p in root.iterdir()) == beside
    return len(taken)


def end_and_samples(last: int, count: int) -> list[int]:
    if EVERY_ACT:
        return list(range(count))
    return sorted({*range(max(0, count - last), count), *range(0, count, count // ELSEWHERE)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_before_any_act_is_mended(
    kind: str, trial_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    args = argv(trial_inputs, root / "out", kind)
    last = LAST.get(kind, FEW)
    chosen = functools.partial(end_and_samples, last)
    acts = check_kills(args, root / "out", tmp_path / "album", chosen, monkeypatch)
    assert acts > last


# Runs the command in forked children, so that each need not import everything again. JAX starts its
# threads only in the children.
SERVER = """
import json, os, signal, sys
from pathlib import Path
from launch import prune
from launch.flags.cli import run
from reference.disk_acts import watched
from launch.run import export
from launch.run.samples import Samples
prune.samples = lambda *_: Samples([], {})
export._by_transformers = lambda *_: export.Check(True, "not checked")
root, args = Path(sys.argv[1]), sys.argv[2:]

def start(kill_at):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    acts = 0
    def act():
        nonlocal acts
        acts += 1
        if acts == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    with watched(root, act):
        code = run(prune.options(), prune.main, args)
    (root.parent / "acts").write_text(str(acts))
    os._exit(code)

for line in sys.stdin:
    print(json.dumps(start(int(line))), file=sys.__stderr__, flush=True)
"""


def test_sigkill_is_mended(trial_inputs: Path, tmp_path: Path) -> None:
    """In a process of its own, at the last acts and a few before."""
    root = tmp_path / "root"
    root.mkdir()
    args = argv(trial_inputs, root / "out", "weights")
    repository = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [repository, "tests"]))}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(root), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
        env=environment,
    ) as server:

        def start(kill_at: int) -> int:
            """Run the command, killed at an act (0: never); return its exit code."""
            assert server.stdin and server.stderr
            print(kill_at, file=server.stdin, flush=True)
            for line in server.stderr:
                if line.strip().lstrip("-").isdigit():
                    return int(line)
            raise AssertionError("the server ended")

        assert start(0) == 0
        want, acts = result(root / "out"), int((tmp_path / "acts").read_text())
        some = [*range(acts - 9, acts + 1), acts // 4, acts // 2]
        for kill_at in range(1, acts + 1) if EVERY_ACT else some:
            shutil.rmtree(root / "out")
            assert start(kill_at) == -signal.SIGKILL
            assert start(0) == 0
            assert result(root / "out") == want, kill_at
            assert [p.name for p in root.iterdir()] == ["out"]
