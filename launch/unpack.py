r"""Write a packed checkpoint as the dense one that it was made from, to the byte.

python -m launch.unpack --model=OUT/packed --output=DIR
"""

import sys
from typing import Any

from rich.console import Console

from launch.flags.cli import Flags, run
from launch.flags.common import output_path
from launch.report import console
from launch.run.staging import staged
from models.checkpoint.hub import resolve
from models.checkpoint.pack import unpack
from models.errors import InputError


def options() -> Flags:
    """Define the flags of `launch.unpack`."""
    f = Flags("launch.unpack", __doc__ or "")
    f.string("model", None, "directory that --pack wrote, or hub id")
    f.string("output", None, "directory to write the dense checkpoint to")
    return f


def main(values: dict[str, Any]) -> None:
    """Unpack the checkpoint.

    Args:
      values: Values of the flags.
    """
    if not values["model"]:
        raise InputError("is missing", "give the directory that `pack` wrote", field="model")
    output = output_path(values["output"])
    source = resolve(values["model"])
    # No marker: whatever lies at the output is kept, an earlier result too.
    with staged(output, marker="") as stage:
        unpack(source, stage.result)
    console.note(f"dense model: {output}", Console())


if __name__ == "__main__":
    sys.exit(run(options(), main))
