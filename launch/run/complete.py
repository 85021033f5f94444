"""Finish a run: write the pruned blocks as a checkpoint, load it back and count what is gone."""

import pathlib

import jax.numpy as jnp
from jax.sharding import Mesh

from eval.size import measure_size
from launch.flags.dtypes import stored_dtype
from launch.report import removal
from launch.run import export
from launch.run.formats import write_formats
from launch.run.job import Job, Output
from models.checkpoint.reader import Checkpoint
from models.checkpoint.writer import Writer, write_json
from models.processes import run_on_primary
from models.progress import Progress
from pruning.types import Outcome


def least_bytes(job: Job, checkpoint: Checkpoint) -> int:
    """Return the bytes that a run writes at least, as far as it is known before the work.

    Args:
      job: The run.
      checkpoint: The dense checkpoint.
    """
    change = job.method.shape_change(checkpoint.model)
    share = 1.0
    if change.narrower or change.shallower:
        # A method that sets its own sparsity tells it only with the result.
        share = 0.0 if job.method.sets_sparsity else 1 - job.request.sparsity
    stored = jnp.dtype(stored_dtype(job.sources.dtype, checkpoint))
    one = checkpoint.parameters * share * stored.itemsize
    # The blocks of one further draw at a time lie beside those of the run.
    draws = len(job.sources.calibration.seeds) > 1
    # Before a recovery the pruned checkpoint is written, too.
    copies = 1 + (job.output.format == "orbax") + draws + bool(job.recoveries)
    return int(one * copies)


def complete(
    directory: pathlib.Path,
    checkpoint: Checkpoint,
    writer: Writer,
    check: export.RoundTripCheck,
    outcome: Outcome,
    output: Output,
    mesh: Mesh | None,
    progress: Progress,
) -> tuple[export.Written, removal.LinearCounts]:
    """Write the checkpoint and `pruning.json`, load the checkpoint back and count its weights.

    Further formats are written beside it.

    Args:
      directory: The writer's directory.
      checkpoint: The dense checkpoint.
      writer: Writer that has all pruned blocks.
      check: Check that has seen all pruned blocks.
      outcome: Result of the method.
      output: Formats to write.
      mesh: Devices of the run; None: one.
      progress: Shows the progress.

    Returns:
      The checkpoint as it loads, and the weights by linear.
    """
    model = checkpoint.model
    non_block, kept = outcome.non_block or model.non_block, outcome.kept_blocks
    if outcome.non_block is not None:
        writer.mark()  # so that all blocks can be read back
        check.run_stored(non_block)
    form = writer.finish(non_block, checkpoint.directory, kept, progress)
    dtype = model.non_block.embed.dtype
    size = writer.parameters
    written = export.load_back(directory, form, check, dtype, size, output.check, progress)
    written = written._replace(other_formats=write_formats(directory, output, written, check, mesh))
    pruned = written.loaded.model
    advance = progress("counting zeros", len(pruned.blocks), unit="blocks")
    counts = removal.count_removed(checkpoint, measure_size(pruned, advance), outcome)
    record = export.pruning_record(checkpoint, outcome, counts.removed)
    run_on_primary(lambda: write_json(directory / export.RECORD, record))
    return written, counts
