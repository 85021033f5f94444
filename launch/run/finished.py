"""Read a finished output of `launch.prune`: which dense block each of its blocks was."""

import itertools
from typing import Any, NamedTuple

from launch.report.files import read_report
from launch.run.export import RECORD, REPORT
from models.checkpoint.reader import Checkpoint
from models.errors import InputError
from models.untrusted import UserFile

REMEDY = "give an output of launch.prune"


class Finished(NamedTuple):
    """A finished output.

    Attributes:
      report: The whole report.
      kept_blocks: Index in the dense model of each block.
    """

    report: dict[str, Any]
    kept_blocks: tuple[int, ...]


def read_finished(pruned: Checkpoint, dense: Checkpoint) -> Finished:
    """Read the report and `pruning.json` of a pruned checkpoint, and check that a teacher fits.

    Args:
      pruned: The pruned checkpoint.
      dense: The teacher.

    Raises:
      InputError: A file is missing or damaged, or the teacher is another model.
    """
    record = UserFile(pruned.directory / RECORD, remedy=REMEDY).read_json()
    path = UserFile(pruned.directory / REPORT, remedy=REMEDY)
    path.check()
    try:
        report = read_report(pruned.directory)
        for key in ("settings", "sparsity", "parameters", "perplexity", "seconds", "protocol"):
            report[key].items()
        parameters = report["parameters"]["dense"]
        kept = record.get("kept_blocks", range(len(pruned.specs)))
        kept_blocks = tuple(int(i) for i in kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise path.error("is damaged") from None
    if parameters != dense.parameters:
        raise InputError(
            f"has {dense.parameters:,} parameters, the model that was pruned had {parameters:,}",
            "give that one",
            field="teacher",
            value=dense.directory,
        )
    _check_blocks(kept_blocks, pruned, dense)
    return Finished(report, kept_blocks)


def _check_blocks(kept: tuple[int, ...], pruned: Checkpoint, dense: Checkpoint) -> None:
    """Raise InputError for blocks that a dense model of this depth cannot have become."""
    rising = all(a < b for a, b in itertools.pairwise(kept))
    depth = len(dense.specs)
    if len(kept) != len(pruned.specs) or not rising or kept[0] < 0 or kept[-1] >= depth:
        raise InputError(
            f"{RECORD} names {len(kept)} blocks of {depth}, the checkpoint has {len(pruned.specs)}",
            REMEDY,
            field="model",
            value=pruned.directory,
        )
