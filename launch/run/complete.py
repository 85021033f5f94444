"""The end of a run: the blocks that were put become a checkpoint, which is loaded back and counted."""

import pathlib

from jax.sharding import Mesh

from eval.size import measure_size
from launch.report import removal
from launch.run import export
from models.checkpoint import orbax as pytrees
from models.checkpoint.reader import Checkpoint
from models.checkpoint.writer import Writer, write_json
from models.processes import run_on_primary
from pruning.types import Outcome


def complete(
    directory: pathlib.Path,
    checkpoint: Checkpoint,
    writer: Writer,
    echo: export.RoundTripCheck,
    outcome: Outcome,
    output_format: str,
    mesh: Mesh | None,
) -> tuple[export.Written, removal.LinearCounts]:
    """The checkpoint in its directory with `pruning.json`, loaded back, and what was removed, counted in it.

    Args:
      checkpoint: the dense one; writer, echo: what its pruned blocks were put into.
      output_format: "orbax" for the pytrees too, which every process of the mesh writes its part of.
    RuntimeError as `export.load_back` says.
    """
    model = checkpoint.model
    form = writer.finish(model.non_block, checkpoint.directory, outcome.kept_blocks)
    written = export.load_back(
        directory, form, echo, model.non_block.embed.dtype, writer.parameters
    )
    if output_format == "orbax":
        pytrees.save(directory, written.loaded.model, mesh)
    counts = removal.count_removed(
        checkpoint, measure_size(written.loaded.model), outcome.kept_blocks
    )
    record = export.pruning_record(checkpoint, outcome, counts.removed)
    run_on_primary(lambda: write_json(directory / "pruning.json", record))
    return written, counts
