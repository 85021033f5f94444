"""Our recoveries of a model that lost its smallest weights, for `launch.bench`."""

import pathlib
import tempfile
import time

from launch.benchmarks.solvers import Task, model_of


def time_recovery(task: Task, recover: str) -> float:
    """Return the seconds of one of our recoveries, compilation included.

    Args:
      task: The work; its sparsity is that of the model that is recovered.
      recover: A call such as `blocks(steps=16)`.
    """
    import jax

    from calibration.runtime import Runtime
    from launch.flags import calls
    from pruning.methods import METHODS
    from pruning.recovery import RECOVERIES
    from pruning.recovery.types import RecoveryInputs
    from pruning.types import Request, prune

    dense = model_of(task)
    request, runtime = Request(task.sparsity), Runtime(task.batch)
    pruned = prune(dense, METHODS["magnitude"](), task.tokens, request, runtime)[0]
    recovery = calls.build("recover", recover, RECOVERIES)
    with tempfile.TemporaryDirectory() as folder:
        inputs = RecoveryInputs(
            pruned,
            dense,
            tuple(range(len(dense.blocks))),
            task.tokens,
            lambda n: task.tokens[:n],
            pathlib.Path(folder),
        )
        blocks = []
        jax.block_until_ready(pruned.blocks)
        start = time.perf_counter()
        recovery.run(inputs, runtime, lambda _, block: blocks.append(block))
        jax.block_until_ready(blocks)
        return time.perf_counter() - start
