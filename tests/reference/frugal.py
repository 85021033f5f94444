"""launch.prune with a limit on memory: python frugal.py BYTES FLAGS...

Models above BYTES count as large, and so do shards. The last line is JSON: the most bytes of arrays
that were alive. The caller sets the project's path.
"""

import functools
import json
import sys
from typing import Any

import jax

from calibration import states
from launch import prune
from launch.flags.cli import run
from launch.run import recovery, resume
from launch.run.export import RoundTripCheck
from models.arch import Block
from models.checkpoint.blocks import LazyBlocks
from models.checkpoint.writer import Writer

most = 0


def count() -> None:
    """Record the bytes that are alive now."""
    global most
    most = max(most, sum(x.nbytes for x in jax.live_arrays()))


def main(room: str, *flags: str) -> int:
    """Run, and count whenever a block has been read and whenever a new one is put beside it."""
    states.available_memory = lambda: {"device": 0, "host": 8 * int(room)}
    for module in (resume, recovery):
        assert module.Writer is Writer
        module.Writer = functools.partial(Writer, shard_bytes=int(room))  # type: ignore[misc, assignment]
    placed, put = LazyBlocks.placed, RoundTripCheck.put

    def noted_placed(self: LazyBlocks, *args: Any) -> Block:
        block = placed(self, *args)
        count()
        return block

    def noted_put(self: RoundTripCheck, i: int, block: Block) -> None:
        count()
        put(self, i, block)

    LazyBlocks.placed, RoundTripCheck.put = noted_placed, noted_put  # type: ignore[method-assign]
    code = run(prune.options(), prune.main, flags)
    print(json.dumps({"most": most}))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
