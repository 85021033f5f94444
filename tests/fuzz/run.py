"""Run thousands of damaged inputs, and print those that end wrongly.

    PYTHONPATH=.:tests python tests/fuzz/run.py --inputs=5000

Each input ends with exit code 2 and one line `error: …`, or with a result that loads. A traceback,
a hang, a crash, more than 6 GiB, or other weights from a damaged journal is a fault. A number
decides an input, so `--first=N --inputs=1 --keep` repeats one and prints what it said. The exit
code is 1 if there are faults.
"""

import argparse
import collections
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from fuzz.cases import Case, make_case
from fuzz.interrupted import write_interrupted
from fuzz.seeds import write_seeds
from fuzz.server import Ended, preload, start, wait_any


def fuzz(
    first: int,
    inputs: int,
    root: pathlib.Path,
    jobs: int = 2,
    limit: float = 120,
    keep: bool = False,
    only: str = "",
) -> list[tuple[int, Case, Ended]]:
    """Run inputs and return how each ended.

    Args:
      first: Number of the first input.
      inputs: How many.
      root: Directory with the sound files in `seeds`, for the damaged ones.
      jobs: Children at a time.
      limit: Seconds after which a child hangs.
      keep: Whether to keep the damaged files.
      only: Name of the one kind of damage; empty for all.
    """
    running: dict[int, tuple[Case, pathlib.Path, float]] = {}
    numbers: dict[str, int] = {}
    ended = []
    waiting = iter(range(first, first + inputs))
    while True:
        while len(running) < jobs and (number := next(waiting, None)) is not None:
            work = root / str(number)
            case = make_case(number, root / "seeds", work, only)
            said = root / f"{number}.stderr"
            running[start(case, said)] = (case, said, time.monotonic())
            numbers[str(case.output.parent)] = number
        if not running:
            return ended
        for case, end in wait_any(running, limit):
            number = numbers.pop(str(case.output.parent))
            ended.append((number, case, end))
            if not keep:
                shutil.rmtree(case.output.parent, ignore_errors=True)
                (root / f"{number}.stderr").unlink(missing_ok=True)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--inputs", type=int, default=5000, help="how many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds after which one hangs")
    parser.add_argument("--only", default="", help="one kind of damage, such as journal")
    parser.add_argument("--keep", action="store_true", help="keep the damaged files")
    options = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="topiary-fuzz-"))
    # Written by a process of its own: here JAX must not look for devices.
    if os.fork() == 0:
        write_seeds(root / "seeds")
        write_interrupted(root / "seeds")
        os._exit(0)
    os.wait()
    preload()
    begun, faults = time.monotonic(), 0
    counts: collections.Counter[int] = collections.Counter()
    seconds: collections.Counter[int] = collections.Counter()
    for at in range(options.first, options.first + options.inputs, 50):
        size = min(50, options.first + options.inputs - at)
        for number, case, end in fuzz(
            at, size, root, options.jobs, options.limit, options.keep, options.only
        ):
            counts[end.code] += 1
            seconds[end.code] += end.seconds
            if end.problem or options.inputs == 1:
                faults += bool(end.problem)
                print(f"{number}: {end.problem or end.code}\n  {case.command} {case.about[:600]!a}")
                print("  " + "\n  ".join(end.stderr.splitlines()[-3:])[:1500], flush=True)
        print(f"{at + size}: {faults} faults, {time.monotonic() - begun:.0f} s", flush=True)
    spent = {code: round(total) for code, total in seconds.items()}
    print(f"exit codes: {dict(counts)}, seconds: {spent}; faults: {faults}")
    if options.keep:
        print(root)
    else:
        shutil.rmtree(root)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
