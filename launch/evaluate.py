"""Perplexity and zero-shot accuracy of a checkpoint.

python -m launch.evaluate --model=DIR --eval_data=wikitext2 --tasks=hellaswag,piqa --json=report.json
"""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.flags.cli import Flags, run
from launch.flags.common import evaluation_flags, mesh_of, model_flags, open_model
from launch.flags.protocols import protocol_flag, stamp
from launch.report import summary
from launch.run.measure import (
    Clock,
    evaluate,
    protocol,
    read_evaluation,
    tokenizer_of,
    write_report,
)
from launch.run.processes import process_flags, start
from launch.run.tasks import evaluate_tasks, read_tasks, task_flags
from models.processes import is_primary


def options() -> Flags:
    """The flags of `launch.evaluate`."""
    f = Flags("launch.evaluate", __doc__ or "")
    model_flags(f)
    protocol_flag(f)
    evaluation_flags(f)
    f.integer("eval_batch", 8, "windows, or requests of a task, at a time", 1)
    task_flags(f)
    process_flags(f)
    f.group("Output")
    f.string("json", None, "file to write the report to")
    return f


def main(values: dict[str, Any]) -> None:
    """Evaluate, print a table, write the report where `--json` says."""
    start(values)
    clock, mesh = Clock("load", "eval"), mesh_of(values["mesh"], values["eval_batch"])
    checkpoint = open_model(values["model"], values["dtype"])
    tokenizer = tokenizer_of(checkpoint)
    data = read_evaluation(
        values["eval_data"], values["eval_length"], values["eval_windows"], checkpoint, tokenizer
    )
    zero_shot = read_tasks(
        values["tasks"], values["limit"], values["num_fewshot"], checkpoint, tokenizer
    )
    clock.record("load")
    found = evaluate(checkpoint.model, data, values["eval_batch"], mesh)
    tasks = evaluate_tasks(zero_shot, checkpoint, values["eval_batch"], mesh, values["task_cache"])
    clock.record("eval")
    if not is_primary():
        return
    followed = summary.followed({"protocol": stamp(values["protocol"], values)})
    heads = ("data set", "perplexity ± standard error", "tokens")
    table = Table(*heads, title=values["model"], title_justify="left", caption=followed or None)
    for name, figures in found.items():
        table.add_row(
            name,
            summary.measured((figures["perplexity"], figures["error"]), fraction=False),
            summary.count(figures["tokens"]),
        )
    Console().print(table)
    if tasks:
        table = Table("task, metric", "value ± standard error")
        for row in summary.task_rows({name: {"dense": figures} for name, figures in tasks.items()}):
            table.add_row(row.label, row.dense)
        Console().print(table)
    if values["json"]:
        result = {
            "model": values["model"],
            "perplexity": {
                name: {"dense": f["perplexity"], "dense_stderr": f["error"], "tokens": f["tokens"]}
                for name, f in found.items()
            },
            "tasks": {name: {"dense": figures} for name, figures in tasks.items()},
            "protocol": stamp(values["protocol"], values) | protocol(data, zero_shot),
            "seconds": clock.seconds,
        }
        write_report(values["json"], result)


if __name__ == "__main__":
    sys.exit(run(options(), main))
