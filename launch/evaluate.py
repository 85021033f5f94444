"""Measure perplexity and zero-shot accuracy of a checkpoint.

python -m launch.evaluate --model=DIR --eval_data=wikitext2 --tasks=hellaswag,piqa --json=FILE
python -m launch.evaluate --model=PRUNED --dense=DIR --eval_data=wikitext2
"""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibration.data import Tokens
from launch.flags.cli import Flags, run
from launch.flags.common import evaluation_flags, mesh_of, model_flags, open_model
from launch.flags.protocols import protocol_flag, stamp
from launch.report import console as terminal
from launch.report import measures, summary
from launch.report.progress import progress
from launch.run.agreement import DenseStates, figures
from launch.run.measure import (
    Clock,
    evaluate,
    model_origin,
    protocol,
    read_evaluation,
    tokenizer_of,
    write_report,
)
from launch.run.processes import process_flags, start
from launch.run.samples import samples
from launch.run.tasks import ZeroShot, evaluate_tasks, read_tasks, task_flags
from models.checkpoint import hub
from models.checkpoint.reader import Checkpoint
from models.processes import is_primary, run_on_primary


def options() -> Flags:
    """Define the flags of `launch.evaluate`."""
    f = Flags("launch.evaluate", __doc__ or "")
    model_flags(f)
    f.string(
        "dense",
        "",
        "the model that --model was pruned from, to measure how far the two agree",
        names=hub.embedded_models(),
        files=True,
    )
    protocol_flag(f)
    evaluation_flags(f)
    f.integer("eval_batch", 8, "windows, or requests of a task, at a time", 1)
    task_flags(f)
    process_flags(f)
    f.group("Output")
    f.string("json", None, "file to write the report to")
    return f


def main(values: dict[str, Any]) -> None:
    """Evaluate the checkpoint, print tables, and write the report to --json."""
    start(values)
    clock, mesh = Clock("load", "eval"), mesh_of(values["mesh"], values["eval_batch"])
    checkpoint = open_model(values["model"], values["dtype"], values["revision"])
    for remark in checkpoint.remarks:
        terminal.note(f"warning: {remark}")
    tokenizer = tokenizer_of(checkpoint)
    data = read_evaluation(
        values["eval_data"], values["eval_length"], values["eval_windows"], checkpoint, tokenizer
    )
    zero_shot = read_tasks(
        values["tasks"],
        values["limit"],
        values["num_fewshot"],
        values["trust_task_files"],
        checkpoint,
        tokenizer,
    )
    dense = open_model(values["dense"], values["dtype"], "") if values["dense"] else None
    clock.record("load")
    with progress() as shown:
        batch = values["eval_batch"]
        comparisons = {}
        if dense:
            states = DenseStates(dense.model, data, batch, mesh)
            comparisons = states.comparisons(checkpoint.model, shown)
        scores = evaluate(checkpoint.model, data, batch, mesh, shown, comparisons)
        results = evaluate_tasks(zero_shot, checkpoint, batch, mesh, values["task_cache"], shown)
        agreement = figures(comparisons)
        if dense:
            _, greedy = run_on_primary(lambda: samples(dense, checkpoint, tokenizer, data, shown))
            agreement = {name: agreement[name] | greedy.get(name, {}) for name in agreement}
    clock.record("eval")
    if not is_primary():
        return
    report = {
        "model": values["model"],
        "perplexity": {
            name: {"dense": s["perplexity"], "dense_stderr": s["error"], "tokens": s["tokens"]}
            for name, s in scores.items()
        },
        **({"agreement": agreement} if dense else {}),
        "tasks": {name: {"dense": metrics} for name, metrics in results.items()},
        "protocol": _protocol(values, checkpoint, data, zero_shot),
        "seconds": clock.seconds,
    }
    show(report, Console())
    if values["json"]:
        write_report(values["json"], report)


def _protocol(
    values: dict[str, Any],
    checkpoint: Checkpoint,
    data: dict[str, Tokens],
    zero_shot: ZeroShot | None,
) -> dict[str, Any]:
    """Return the report's `protocol`."""
    return (
        stamp(values["protocol"], values)
        | model_origin(checkpoint.directory)
        | protocol(data, zero_shot)
        | ({"dense": values["dense"]} if values["dense"] else {})
    )


def show(report: dict[str, Any], console: Console) -> None:
    """Print the perplexities and, if there are any, the metrics of tasks.

    Args:
      report: The report, as --json gets it.
      console: Where to print.
    """
    heads = ("data set", "perplexity ± standard error", "tokens")
    note = summary.protocol_note(report) or None
    # Text, not str: rich reads [brackets] in a str as markup, and paths may hold them.
    table = Table(*heads, title=Text(report["model"]), title_justify="left", caption=note)
    labels = summary.short_names(report["perplexity"])
    for name, s in report["perplexity"].items():
        value = summary.measured((s["dense"], s["dense_stderr"]), fraction=False)
        table.add_row(Text(labels[name]), value, summary.count(s["tokens"]))
        for label, value, unit in measures.rows(report, name):
            table.add_row(Text(label), value, unit)
    console.print(table)
    if report["tasks"]:
        table = Table("task, metric", "value ± standard error")
        for row in summary.task_rows(report["tasks"]):
            table.add_row(Text(row.label), row.dense)
        console.print(table)


if __name__ == "__main__":
    sys.exit(run(options(), main))
