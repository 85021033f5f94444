"""Several pruned models side by side: a table, and what each pays for its size and speed.

python -m launch.compare out/wanda out/flap out/sleb
python -m launch.compare out/* --speed=speed.json --markdown=table.md --latex=table.tex --plot=pareto.svg
"""

import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from launch.flags.cli import Flags, run
from launch.report import compare_plot, console, summary
from launch.report.compare_plot import Point
from launch.run import export
from models.errors import InputError

LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)
MEAN = "mean of the tasks"  # of each task the first accuracy that its report has
PARTS = {
    "prompt": "prompts",
    "generation": "generation",
}  # of a model's measured speed, as the table calls them


def options() -> Flags:
    """The flags of `launch.compare`."""
    f = Flags("launch.compare", __doc__ or "", names="directories")
    f.string(
        "speed", None, "what launch.bench --what=speed --json=FILE wrote of the same directories"
    )
    f.string("markdown", None, "file to write the table to, as Markdown")
    f.string("latex", None, "file to write the table to, as a LaTeX tabular")
    f.string(
        "plot",
        None,
        "file to draw perplexity against parameters, and against speed, to: .svg or .png",
    )
    return f


class Run(NamedTuple):
    """A finished run.

    `name`: the method, and what was done beside it; `share`: parameters that are left, of the dense model's (zeros that stay stored are
    not); `report`: as launch.prune wrote it; `faster`: {part: tokens a second over the dense model's} if that was measured.
    """

    name: str
    share: float
    report: Mapping[str, Any]
    faster: Mapping[str, float]


def _run(report: Mapping[str, Any], faster: Mapping[str, float]) -> Run:
    settings = report["settings"]
    extra = [
        settings.get(key)
        for key in ("allocation", "refine")
        if settings.get(key) not in (None, "uniform", "none")
    ]
    return Run(
        ", ".join([report["method"], *extra]), 1 - report["sparsity"]["total"], report, faster
    )


def read(directories: Sequence[str], speed: str | None) -> list[Run]:
    """The runs; InputError for a directory that is none, or a file that holds no speeds of them."""
    if not directories:
        raise InputError("no directories were given: python -m launch.compare DIR DIR ...")
    faster, runs = _speeds(speed) if speed else {}, []
    for name in directories:
        path = pathlib.Path(name).expanduser() / export.REPORT
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            runs.append(_run(report, faster.get(str(pathlib.Path(name)), {})))
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{name} is no directory that launch.prune wrote: it has no {export.REPORT} that can be read"
            ) from None
    if speed and not any(r.faster for r in runs):
        raise InputError(
            f"--speed={speed} has none of these directories: measure them with launch.bench --what=speed --pruned=..."
        )
    return runs


def _speeds(file: str) -> dict[str, dict[str, float]]:
    """{directory: {part: speed-up over the dense model}} at the first batch size of a benchmark."""
    try:
        figures = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))["figures"]
        rows = next(iter(figures.values()))
        return {
            str(pathlib.Path(name)): {part: float(row["speedup"][part]) for part in PARTS}
            for name, row in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise InputError(
            f"--speed={file} is not what launch.bench --what=speed --json wrote"
        ) from None


def differences(runs: Sequence[Run]) -> Iterator[str]:
    """What makes figures that stand in one column not comparable, a sentence each."""
    if len({json.dumps(r.report["parameters"]["dense"]) for r in runs}) > 1:
        yield "the dense models are not the same"
    for name in data_sets(runs):
        found = {
            r.report.get("protocol", {}).get("evaluation", {}).get(name, {}).get("sha256")
            for r in runs
            if name in r.report["perplexity"]
        }
        if len(found) > 1:
            yield f"the tokens of {name} are not the same in all runs"


def data_sets(runs: Sequence[Run]) -> list[str]:
    """Those that any of the runs was evaluated on."""
    return list(dict.fromkeys(name for r in runs for name in r.report["perplexity"]))


def _metrics(runs: Sequence[Run]) -> list[tuple[str, str]]:
    return list(
        dict.fromkeys(
            (m.task, m.name)
            for r in runs
            for m in summary.metrics(r.report.get("tasks", {}))
            if m.fraction
        )
    )


def _tasks(metrics: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Each task's first metric."""
    return dict(reversed(metrics))


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """The table as text: headings, the dense model, a row a run; a column for each data set and each accuracy, for the mean of several
    tasks, and for the protocol where one was asked for by name."""
    names, metrics, fast = data_sets(runs), _metrics(runs), any(r.faster for r in runs)
    heads = [
        "run",
        "removed",
        "parameters",
        "size",
        *(f"perplexity, {summary.shorten(n)}" for n in names),
    ]
    heads += [f"{task}, {metric}" for task, metric in metrics] + [MEAN] * (len(_tasks(metrics)) > 1)
    heads += list(PARTS.values()) * fast + ["pruned in"]
    if any(summary.followed(r.report) for r in runs):
        heads.append("protocol")
    return [
        heads,
        _row(runs, None, names, metrics, fast),
        *(_row(runs, r, names, metrics, fast) for r in runs),
    ]


def _row(
    runs: Sequence[Run],
    r: Run | None,
    names: Sequence[str],
    metrics: Sequence[tuple[str, str]],
    fast: bool,
) -> list[str]:
    """A run's cells; of the dense model for None, by the first run that has the figure."""
    which, own = ("pruned", [r]) if r else ("dense", list(runs))

    def first(found: Iterator[Any]) -> Any:
        return next((x for x in found if x is not None), None)

    def accuracy(task: str, name: str) -> tuple[float, float | None] | None:
        every = (
            m
            for x in own
            for m in summary.metrics(x.report.get("tasks", {}))
            if (m.task, m.name) == (task, name)
        )
        return first(getattr(m, which) for m in every)

    report = own[0].report
    cells = [r.name if r else "dense", summary.percent(report["sparsity"]["total"]) if r else ""]
    cells += [summary.count(report["parameters"][which]), summary.size(report["bytes"][which])]
    cells += [
        _perplexity(first(x.report["perplexity"].get(n, {}).get(which) for x in own), r, n)
        for n in names
    ]
    accuracies = {metric: accuracy(*metric) for metric in metrics}
    cells += [summary.measured(value, fraction=True) for value in accuracies.values()]
    if len(tasks := _tasks(metrics)) > 1:
        cells.append(
            summary.measured(_mean([accuracies[metric] for metric in tasks.items()]), fraction=True)
        )
    if fast:
        cells += [
            f"{r.faster[p]:.2f}x" if r and r.faster else summary.ABSENT if r else "1.00x"
            for p in PARTS
        ]
    cells.append(summary.duration(report["seconds"]["calibrate_and_prune"]) if r else "")
    if any(summary.followed(x.report) for x in runs):
        cells.append(
            (summary.followed(r.report).removeprefix("protocol ") or summary.ABSENT) if r else ""
        )
    return cells


def _mean(values: Sequence[tuple[float, float | None] | None]) -> tuple[float, float | None] | None:
    """The mean of accuracies with its standard error, the tasks' documents being independent; None if one was not measured."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    errors = [error for _, error in known if error is not None]
    error = math.hypot(*errors) / len(known) if len(errors) == len(known) else None
    return sum(value for value, _ in known) / len(known), error


def _perplexity(value: float | None, r: Run | None, data: str) -> str:
    """A perplexity, with what a pruned model has over calibration draws where there were several."""
    over = summary.drawn(r.report, data) if r else None
    return summary.perplexity(value) + (
        f" ({over.said} over {len(r.report['draws'])} draws)" if r and over else ""
    )


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table in Markdown, figures to the right."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" + "---:|" * (len(table[0]) - 1), *lines[1:]]) + "\n"


def latex(table: Sequence[Sequence[str]]) -> str:
    """The table as a tabular with the rules of booktabs."""
    lines = [
        " & ".join(
            cell.translate(LATEX).replace("±", r"$\pm$").replace("…", r"\ldots{}") for cell in row
        )
        + r" \\"
        for row in table
    ]
    begin = [
        rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}",
        r"\toprule",
        lines[0],
        r"\midrule",
    ]
    return "\n".join([*begin, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def points(runs: Sequence[Run], data: str) -> dict[str, list[Point]]:
    """What is drawn for a data set: {what the axis says: a point a run}, for parameters, and for each speed that was measured."""
    seen = [
        (r, r.report["perplexity"][data]["pruned"]) for r in runs if data in r.report["perplexity"]
    ]
    dense = next(
        r.report["perplexity"][data]["dense"] for r in runs if data in r.report["perplexity"]
    )
    drawn = {
        compare_plot.PARAMETERS: [
            Point("dense", 1.0, dense),
            *(Point(r.name, r.share, p) for r, p in seen),
        ]
    }
    for part, label in PARTS.items():
        if fast := [Point(r.name, r.faster[part], p) for r, p in seen if r.faster]:
            drawn[f"{label}, times as fast"] = [Point("dense", 1.0, dense), *fast]
    return drawn


def _write(flag: str, file: str, text: str) -> None:
    try:
        pathlib.Path(file).write_text(text, encoding="utf-8")
    except OSError as e:
        raise InputError(
            f"--{flag}={file} cannot be written ({e.strerror}): choose another place"
        ) from None


def main(values: dict[str, Any]) -> None:
    """Print the table, and write what the flags ask for."""
    if values["plot"] and pathlib.Path(values["plot"]).suffix not in (".svg", ".png"):
        raise InputError(f"--plot={values['plot']} must end in .svg or .png")
    runs = read(values["directories"], values["speed"])
    table = rows(runs)
    console.show_wide(str(runs[0].report["model"]), table, Console())
    for sentence in differences(runs):
        console.note(f"warning: {sentence}")
    for flag, write in (("markdown", markdown), ("latex", latex)):
        if values[flag]:
            _write(flag, values[flag], write(table))
    if values["plot"]:
        compare_plot.save(
            {name: points(runs, name) for name in data_sets(runs)}, pathlib.Path(values["plot"])
        )


if __name__ == "__main__":
    sys.exit(run(options(), main))
