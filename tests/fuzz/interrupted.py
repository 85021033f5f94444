"""Leave the files of a run that was interrupted, for the cases that damage them."""

import pathlib
import shutil
from typing import Any

from fuzz.seeds import LENGTH

from launch import prune
from launch.flags.cli import run


class _Interrupted(BaseException):
    """Stands for a kill, which no code can catch."""


def write_interrupted(seeds: pathlib.Path) -> None:
    """Interrupt a run behind its last block, keep its files as `.out.unfinished`, and finish it.

    Args:
      seeds: Directory of sound files.
    """

    def interrupt(*_: Any, **__: Any) -> None:
        # Before the error is handled, as a kill would be.
        shutil.copytree(seeds / ".out.unfinished", seeds / ".kept")
        raise _Interrupted

    original, prune.complete = prune.complete, interrupt
    argv = [
        f"--model={seeds / 'llama'}",
        "--method=wanda",
        "--sparsity=0.5",
        f"--calibration={seeds / 'tokens.npy'}",
        f"--eval_data={seeds / 'tokens.npy'}",
        f"--calibration_length={LENGTH}",
        "--calibration_samples=4",
        f"--output={seeds / 'out'}",
        f"--eval_length={LENGTH}",
        "--eval_windows=2",
    ]
    try:
        run(prune.options(), prune.main, argv)
    except _Interrupted:
        pass
    finally:
        prune.complete = original
    run(prune.options(), prune.main, argv)
    shutil.rmtree(seeds / ".out.unfinished", ignore_errors=True)
    (seeds / ".kept").rename(seeds / ".out.unfinished")
