r"""Find the zeros of a pruned model that fine-tuning lost, and put them back.

python -m launch.masks --model=PRUNED --check=FINETUNED
python -m launch.masks --model=PRUNED --check=FINETUNED --apply --output=DIR

FINETUNED is a checkpoint that was trained from PRUNED, or a LoRA adapter of peft, which counts as
merged. Exit code: 0 if no zero is lost or the zeros were put back, 1 if zeros are lost, 2 for an
error.
"""

import contextlib
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.flags.cli import Flags, run
from launch.flags.common import output_path
from launch.report import console
from launch.report.progress import progress
from launch.run.export import RECORD
from launch.run.measure import write_report
from launch.run.staging import staged
from models.checkpoint import hub
from models.checkpoint.masks import Zeros, lost_zeros, restore_zeros
from models.errors import InputError

LOST = 1  # exit code


def options() -> Flags:
    """Define the flags of `launch.masks`."""
    f = Flags("launch.masks", __doc__ or "")
    f.group("Models")
    f.string(
        "model",
        None,
        "the pruned model: Hugging Face directory, --pack's directory or hub id",
        names=hub.embedded_models(),
        files=True,
    )
    f.string(
        "check", None, "the fine-tuned model: Hugging Face or adapter directory, or hub id of one"
    )
    f.group("Output")
    f.boolean("apply", False, "write the fine-tuned model with the zeros put back to --output")
    f.string("output", None, "directory to write it to")
    f.string("json", None, "file to write the counts to")
    return f


def main(values: dict[str, Any]) -> int:
    """Print the zeros that were lost by linear, and put them back if asked to.

    Args:
      values: Values of the flags.

    Returns:
      Exit code.
    """
    if values["output"] and not values["apply"]:
        raise InputError(
            "does nothing without `apply`", "give both, or leave it out", field="output"
        )
    output = output_path(values["output"]) if values["apply"] else None
    pruned, finetuned = _find(values, "model"), _find(values, "check", adapters=True)
    remarks: tuple[str, ...] = ()
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(progress())
        if output:
            # No marker: whatever lies at the output is kept, an earlier result too.
            stage = stack.enter_context(staged(output, marker=""))
            zeros, remarks = restore_zeros(pruned, finetuned, stage.result, shown)
            # It lacks the same weights of the dense model, so it is described by the same record.
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(pruned / RECORD, stage.result)
        else:
            zeros = lost_zeros(pruned, finetuned, shown)
        report = {name: values[name] for name in ("model", "check", "output")} | counts(zeros)
        if values["json"]:
            write_report(values["json"], report)  # before the output is there: it may fail
    for remark in remarks:
        console.note(f"warning: {remark}")
    show(report, Console())
    return LOST if report["lost"] and not output else 0


def _find(values: Mapping[str, Any], field: str, adapters: bool = False) -> pathlib.Path:
    """Return the directory of the model that a flag names, downloaded if needed."""
    if not values[field]:
        raise InputError("is missing", "give a directory or hub id", field=field)
    try:
        return hub.resolve(values[field], adapters=adapters)
    except InputError as e:
        # It calls its argument `model`.
        own = field if e.field == "model" else e.field
        raise InputError(e.reason, e.remedy, field=own, value=e.value) from e


def counts(zeros: Mapping[str, Zeros]) -> dict[str, Any]:
    """Return the report's counts: in all linears and by linear.

    Args:
      zeros: Zeros by linear.
    """
    total = Zeros(*(sum(column) for column in zip(*zeros.values(), strict=True)))
    per_linear = {name: _counts(linear) for name, linear in zeros.items()}
    return {**_counts(total), "per_linear": per_linear}


def _counts(zeros: Zeros) -> dict[str, Any]:
    """Return the counts and shares of a linear, or of all."""
    return {
        "entries": zeros.entries,
        "zeros": {"pruned": zeros.pruned, "finetuned": zeros.finetuned},
        "sparsity": {
            "pruned": zeros.pruned / zeros.entries,
            "finetuned": zeros.finetuned / zeros.entries,
        },
        "lost": zeros.lost,
    }


def show(report: Mapping[str, Any], out: Console) -> None:
    """Print a table of the linears that lost zeros, and what follows.

    Args:
      report: The report, as --json gets it.
      out: Where to print.
    """
    linears = report["per_linear"]
    losers = {name: linear for name, linear in linears.items() if linear["lost"]}
    if losers:
        table = Table("linear", title=Text(str(report["check"])), title_justify="left")
        for heading in ("zeros, pruned", "fine-tuned", "lost"):
            table.add_column(heading, justify="right")
        for name, linear in losers.items():
            table.add_row(Text(name), *_cells(linear))
        table.add_section()
        table.add_row("all linears", *_cells(report))
        out.print(table)
    if not report["zeros"]["pruned"]:
        console.note("warning: the pruned model has no zeros in its linears: none can be lost")
    console.note(
        f"{len(losers)} of {len(linears)} linears lost zeros: {report['lost']:,} of "
        f"{report['zeros']['pruned']:,}",
        out,
    )
    if report["output"]:
        console.note(f"model with the zeros put back: {report['output']}", out)


def _cells(linear: Mapping[str, Any]) -> list[str]:
    """Return the shares of zeros and the number that was lost."""
    shares = linear["sparsity"]
    return [*(f"{shares[k]:.2%}" for k in ("pruned", "finetuned")), f"{linear['lost']:,}"]


if __name__ == "__main__":
    sys.exit(run(options(), main))
