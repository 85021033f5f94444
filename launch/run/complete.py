"""Finish a run: turn the pruned blocks into a checkpoint, load it back and count what is gone."""

import pathlib

import jax.numpy as jnp
from jax.sharding import Mesh

from eval.size import measure_size
from launch.report import removal
from launch.run import export
from models.checkpoint import orbax as pytrees
from models.checkpoint.reader import Checkpoint, open_checkpoint
from models.checkpoint.writer import Writer, write_json
from models.processes import run_on_primary
from pruning.types import Outcome


def complete(
    directory: pathlib.Path,
    checkpoint: Checkpoint,
    writer: Writer,
    check: export.RoundTripCheck,
    outcome: Outcome,
    output_format: str,
    mesh: Mesh | None,
) -> tuple[export.Written, removal.LinearCounts]:
    """Write the checkpoint and `pruning.json`, load the checkpoint back and count its weights.

    Args:
      directory: The writer's directory.
      checkpoint: The dense checkpoint.
      writer: Writer that has all pruned blocks.
      check: Check that has seen all pruned blocks.
      outcome: Result of the method.
      output_format: "orbax" to write the pytrees too, each process its part.
      mesh: Devices of the run; None: one.

    Returns:
      The checkpoint as it loads, and the weights by linear.

    Raises:
      RuntimeError: The checkpoint does not load as it was written.
    """
    model = checkpoint.model
    form = writer.finish(model.non_block, checkpoint.directory, outcome.kept_blocks)
    dtype = model.non_block.embed.dtype
    written = export.load_back(directory, form, check, dtype, writer.parameters)
    if output_format == "orbax":
        # The type that config.json names, in which they are read back.
        stored = jnp.dtype(written.loaded.config["dtype"])
        pytrees.save(directory, open_checkpoint(directory, stored).model, mesh)
    counts = removal.count_removed(
        checkpoint, measure_size(written.loaded.model), outcome.kept_blocks
    )
    record = export.pruning_record(checkpoint, outcome, counts.removed)
    run_on_primary(lambda: write_json(directory / "pruning.json", record))
    return written, counts
