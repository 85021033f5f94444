"""The comparison shows the reports' numbers and warns about those that cannot be compared."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from launch import compare
from launch.flags.cli import run


def report(
    method: str, total: float, perplexity: float, zeros: bool = False, **more: Any
) -> dict[str, Any]:
    dense = 1000
    stored = dense if zeros else int(dense * (1 - total))
    return {
        "model": "m",
        "method": method,
        "settings": {"allocation": "uniform", "refine": "none", "pattern": "unstructured"},
        "protocol": {"evaluation": {"a|b": {"sha256": "1", "samples": 8, "length": 64}}},
        "sparsity": {"target": total, "total": total},
        "parameters": {"dense": dense, "pruned": stored},
        "bytes": {"dense": 4 * dense, "pruned": 4 * stored},
        "perplexity": {"a|b": {"dense": 10.0, "pruned": perplexity, "tokens": 5}},
        "tasks": {},
        "seconds": {"calibrate_and_prune": 61.0},
    } | more


def table_of(directories: list[str], speed: str | None = None) -> list[list[str]]:
    runs = compare.read(directories, speed)
    return compare.rows(runs, compare.marks_of(runs))


TASKS = {
    "piqa": {
        "dense": {"acc,none": 0.7, "acc_stderr,none": 0.01},
        "pruned": {"acc,none": 0.6, "acc_stderr,none": 0.02},
    }
}


def write(directory: Path, content: dict[str, Any]) -> str:
    directory.mkdir()
    (directory / "pruning_report.json").write_text(json.dumps(content))
    return str(directory)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [
        write(tmp_path / "one", report("wanda_sp", 0.25, 20.0)),
        write(
            tmp_path / "two",
            report(
                "flap",
                0.5,
                15.0,
                tasks=TASKS,
                settings={"allocation": "owl(m=7)", "refine": "dsnot"},
            ),
        ),
        write(tmp_path / "three", report("sleb(blocks=2)", 0.1, math.inf)),
    ]


def test_the_table_holds_the_numbers_of_the_reports(runs: list[str], tmp_path: Path) -> None:
    speed = {
        "1": {
            d: {"speedup": {"prompt": 1 + k, "generation": 2 + k}}
            for k, d in enumerate(["m", *runs[:2]])
        }
    }
    (tmp_path / "speed.json").write_text(json.dumps({"figures": speed}))
    table = table_of(runs, str(tmp_path / "speed.json"))
    assert table == [
        [
            "run",
            "removed",
            "parameters",
            "size",
            "perplexity, a|b",
            "piqa, acc,none",
            "prompts",
            "generation",
            "pruned in",
        ],
        ["dense", "", "1,000", "3.9 KiB", "10.000", "70.00% ± 1.00%", "1.00x", "1.00x", ""],
        ["wanda_sp 25%", "25%", "750", "2.9 KiB", "20.000", "—", "2.00x", "3.00x", "1 min 01 s"],
        [
            "flap 50%, owl(m=7), dsnot",
            "50%",
            "500",
            "2.0 KiB",
            "15.000",
            "60.00% ± 2.00%",
            "3.00x",
            "4.00x",
            "1 min 01 s",
        ],
        ["sleb(blocks=2) 10%", "10%", "900", "3.5 KiB", "inf", "—", "—", "—", "1 min 01 s"],
    ]


def test_the_command_prints_and_writes(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {flag: tmp_path / f"table.{flag}" for flag in ("markdown", "latex")}
    flags = [f"--{flag}={file}" for flag, file in files.items()]
    assert (
        run(
            compare.options(),
            compare.main,
            [
                *runs,
                *flags,
                f"--plot={tmp_path / 'plot.svg'}",
                f"--plot_dark={tmp_path / 'dark.svg'}",
            ],
        )
        == 0
    )
    seen = capsys.readouterr()
    assert "wanda_sp" in seen.out and "warning" not in seen.err
    lines = files["markdown"].read_text().splitlines()
    assert len(lines) == 6 and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {8}
    tabular = files["latex"].read_text().splitlines()
    assert (
        tabular[0] == r"\begin{tabular}{lrrrrrr}" and r"wanda\_sp 25\% & 25\% & 750" in tabular[5]
    )
    drawn = (tmp_path / "plot.svg").read_text()
    assert "flap 50%, owl, dsnot" in drawn and "sleb" not in drawn, (
        "a run without a finite perplexity has no place"
    )
    dark = (tmp_path / "dark.svg").read_text()
    assert "#e6edf3" in dark and "#12171d" not in dark and "#e6edf3" not in drawn


def test_the_mean_of_several_tasks_needs_all_of_them(tmp_path: Path) -> None:
    """Each task's first accuracy counts; the error is that of independent documents."""
    more = {
        "boolq": {
            "dense": {"acc,none": 0.5, "acc_stderr,none": 0.02},
            "pruned": {"acc,none": 0.4, "acc_stderr,none": 0.0},
        }
    }
    norm = {"acc_norm,none": 0.9, "acc_norm_stderr,none": 0.3}
    piqa = {"piqa": {which: figures | norm for which, figures in TASKS["piqa"].items()}}
    both = write(tmp_path / "both", report("flap", 0.5, 15.0, tasks=piqa | more))
    one = write(tmp_path / "one", report("wanda", 0.5, 15.0, tasks=TASKS))
    heads, dense, flap, wanda = table_of([both, one])
    assert heads[5:-1] == [
        "piqa, acc,none",
        "piqa, acc_norm,none",
        "boolq, acc,none",
        "mean of the tasks",
    ]
    assert (dense[-2], flap[-2], wanda[-2]) == ("60.00% ± 1.12%", "50.00% ± 1.00%", "—")


def test_zeros_that_stay_stored_are_named_and_stray_ones_are_not(tmp_path: Path) -> None:
    """Weights taken out, zeros in place, a few stray zeros beside weights taken out, and both."""
    runs = [
        write(tmp_path / "a", report("flap", 0.25, 20.0)),
        write(tmp_path / "b", report("wanda", 0.3947, 20.0, zeros=True)),
        write(
            tmp_path / "c", report("flap", 0.252, 21.0, parameters={"dense": 1000, "pruned": 750})
        ),
        write(
            tmp_path / "d", report("llmrank", 0.4, 9.0, parameters={"dense": 1000, "pruned": 700})
        ),
        write(tmp_path / "e", report("wanda", 0.0, 9.0, zeros=True)),
    ]
    removed = [row[1] for row in table_of(runs)[2:]]
    assert removed == ["25%", "39.47% zeros", "25%", "30%, 10% zeros", "0%"]


def test_runs_on_other_data_or_of_another_model_are_marked(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = compare.marks_of(compare.read(runs, None))
    assert (plain.model, plain.data, list(plain.notes)) == ({}, {}, [])
    tokens = {"a|b": {"sha256": "2", "samples": 3, "length": 32}}
    other = report("wanda", 0.5, 12.0, protocol={"evaluation": tokens})
    small = report("flap", 0.2, 12.0, parameters={"dense": 9, "pruned": 9})
    # The first of all, so that what most runs have is not what the first has.
    every = [write(tmp_path / "w", other), *runs, write(tmp_path / "s", small)]
    assert (
        run(
            compare.options(),
            compare.main,
            [*every, f"--markdown={tmp_path / 't.md'}", f"--plot={tmp_path / 'p.svg'}"],
        )
        == 0
    )
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: not comparable: [a] flap 20%: another dense model, 9 parameters, not 1,000",
        "warning: not comparable: [b] wanda 50%: other tokens of a|b, 3 windows of 32 (2), "
        "not 8 windows of 64 (1)",
    ]
    table = (tmp_path / "t.md").read_text()
    assert "| dense |  | 1,000 |" in table and "| flap 20% [a] |" in table
    assert "| wanda 50% |" in table and "| 12.000 [b] |" in table
    assert table.count("[a]") == table.count("[b]") == 2
    plot = (tmp_path / "p.svg").read_text()
    assert "flap 20% [a]" in plot and "wanda 50% [b]" in plot
    assert "other evaluation data" in plot


def test_the_table_fits_eighty_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    calls = ["wanda", 'llmrank(scorer="wpr", gamma=0.5, theta=0.5, units="neurons")', "magnitude"]
    calls.append("magnitude_sp")
    names = [
        write(tmp_path / f"r{k}", report(call, 0.3947, 1e5, zeros=True))
        for k, call in enumerate(calls)
    ]
    assert run(compare.options(), compare.main, names) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("run" in line for line in lines) == 1, "one part holds all columns"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "no directories were given"),
        (["nowhere"], "no readable pruning_report.json"),
        (["one", "--speed=one/pruning_report.json"], "is not output of launch.bench"),
        (["one", "--speed=speed.json"], "none of these directories"),
        (["one", "--plot=x.pdf"], "must end in .svg or .png"),
        (["one", "--latex=nowhere/x.tex"], "--latex=nowhere/x.tex cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str],
    says: str,
    runs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speed.json").write_text(
        json.dumps({"figures": {"1": {"x": {"speedup": {"prompt": 1, "generation": 1}}}}})
    )
    assert run(compare.options(), compare.main, argv) == 2
    assert says in capsys.readouterr().err


def test_the_median_joins_runs_that_differ_in_seed_and_micro_batch_alone(tmp_path: Path) -> None:
    def run_of(name: str, perplexity: float, **settings: Any) -> str:
        content = report("wanda", 0.5, perplexity, zeros=True)
        content["settings"] |= settings
        return write(tmp_path / name, content)

    directories = [
        run_of("a", 20.0, calibration_batch=2, seed=0, output="a"),
        run_of("other", 90.0, calibration_batch=2, seed=0, output="other", calibration="c4"),
        run_of("b", 26.0, calibration_batch=4, seed=0, output="b"),
        run_of("c", 21.0, calibration_batch=2, seed=1, output="c"),
    ]
    runs = compare.read(directories, None, repeated=True)
    perplexities = [r.report["perplexity"]["a|b"]["pruned"] for r in runs]
    assert perplexities == [21.0, 90.0]
    assert len({r.name for r in runs}) == 2
