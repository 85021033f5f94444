"""A sweep runs the trials of its grid, each a run of launch.prune, and loses none on a failure."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from calibration.step_cache import StepCache
from launch import prune, sweep
from launch.flags.cli import run
from launch.flags.termination import Terminated
from launch.report.files import read_report
from launch.run import export, resume
from launch.run.samples import Samples
from launch.trials import trial as trials
from models.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _skip_samples_and_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the steps of a trial that take seconds and that no test here is about."""
    monkeypatch.setattr(prune, "samples", lambda *_: Samples([], {}))
    monkeypatch.setattr(export, "_by_transformers", lambda *_: export.Check(True, "not asked"))


def argv(trial_inputs: Path, output: Path, *more: str) -> list[str]:
    data = [
        f"--calibration={trial_inputs / 'calib.npy'}",
        f"--eval_data={trial_inputs / 'eval.npy'}",
        "--calibration_batch=2",
    ]
    return [
        f"--model={trial_inputs / 'llama'}",
        *data,
        "--mesh=data=1",
        f"--output={output}",
        *more,
    ]


def call(args: list[str]) -> int:
    return run(sweep.options(), sweep.main, args)


def table_of(output: Path) -> dict[str, dict[str, str]]:
    with (output / "sweep.csv").open(newline="") as file:
        return {row["trial"]: row for row in csv.DictReader(file)}


def names(*more: str) -> list[str]:
    """The trials of a grid, in order."""
    values = sweep.options().parse(["--model=m", *more])
    return [trial.name for trial in sweep.grid(values, Path("out"))]


def test_a_grid_has_every_combination_seed_after_seed() -> None:
    got = names(
        '--methods=wanda,flap(metric="WIFV",bias=False)',
        "--sparsities=0.3,0.5",
        "--allocations=uniform,owl",
        "--seeds=0,7",
    )
    assert len(got) == len(set(got)) == 2 * 2 * 2 * 2
    assert got[:4] == [
        "wanda-0.3-seed0",
        "wanda-0.5-seed0",
        "wanda-0.3-owl-seed0",
        "wanda-0.5-owl-seed0",
    ]
    assert all(name.endswith("seed0") for name in got[:8]) and all(
        name.endswith("seed7") for name in got[8:]
    )
    assert got[4].startswith("flap_bias=False_metric=WIFV_")


def test_a_method_may_set_its_own_sparsity_allocation_and_refinement() -> None:
    got = names(
        "--methods=wanda,wanda@0.5,flap(bias=False)@0.2,wanda+owl(m=7, lam=0.1),"
        "sparsegpt@0.6 + dsnot,wanda@0.5+alpha+dsnot",
        "--sparsities=0.3,0.4",
    )
    assert [re.sub("_[0-9a-f]{6}", "", name) for name in got] == [
        "wanda-0.3-seed0",
        "wanda-0.4-seed0",
        "wanda-0.5-seed0",
        "flap_bias=False-0.2-seed0",
        "wanda-0.3-owl_lam=0.1_m=7-seed0",
        "wanda-0.4-owl_lam=0.1_m=7-seed0",
        "sparsegpt-0.6-dsnot-seed0",
        "wanda-0.5-alpha-dsnot-seed0",
    ]


def test_a_trial_with_its_own_settings_runs_with_them(trial_inputs: Path, tmp_path: Path) -> None:
    methods = ["--methods=wanda@0.5+owl+dsnot,sleb(blocks=1),flap@0.3", "--seeds=3"]
    assert call(argv(trial_inputs, tmp_path / "out", *methods)) == 0
    rows = list(table_of(tmp_path / "out").values())
    assert [
        [r[k] for k in ("state", "method", "allocation", "refine", "sparsity")] for r in rows
    ] == [
        ["finished", "wanda", "owl", "dsnot", "0.5"],
        ["finished", "sleb(blocks=1)", "uniform", "none", "0.25"],
        ["finished", "flap", "uniform", "none", "0.3"],
    ]
    report = json.loads(
        (tmp_path / "out/trials/wanda-0.5-owl-dsnot-seed3/pruning_report.json").read_text()
    )
    assert {"--sparsity=0.5", "--allocation=owl", "--refine=dsnot", "--seed=3"} <= set(
        shlex.split(report["command"])
    )


def test_a_method_that_sets_its_sparsity_has_one_trial() -> None:
    assert [n[:13] for n in names("--methods=sleb(blocks=1),sleb", "--sparsities=0.3,0.5")] == [
        "sleb_blocks=1",
        "sleb-0.3-seed",
        "sleb-0.5-seed",
    ]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ('x(a="b-c")', 'x(a="b/c")'),
        ("x(a=1)", "x(a=1.0)"),
        ("x(a=1)", 'x(a="1")'),
        ('x(a="' + "y" * 80 + '1")', 'x(a="' + "y" * 80 + '2")'),
        ("x(a=1)", "x(b=1)"),
    ],
)
def test_two_calls_never_have_one_name(a: str, b: str) -> None:
    assert trials.label(a) != trials.label(b)
    for text in (a, b):
        assert len(trials.label(text)) < 100 and not set(trials.label(text)) & set("/\\ \"'()*?")


def test_one_call_has_one_name_however_it_is_written() -> None:
    assert trials.label('flap( metric="IFV", bias=True)') == trials.label(
        "flap(bias=True,metric='IFV')"
    )
    assert trials.label("wanda()") == trials.label("wanda") == "wanda"


BAD = {
    "unknown method": (["--methods=wanda,zebra", "--sparsities=0.5"], "zebra"),
    "unknown allocation": (
        ["--methods=wanda", "--sparsities=0.5", "--allocations=uniform,zebra"],
        "zebra",
    ),
    "sparsity 1": (["--sparsities=0.5,1"], "--sparsities=1 must be at least 0 and less than 1"),
    "no sparsity": (["--methods=wanda"], "--sparsity is missing"),
    "twice": (["--methods=wanda,wanda()", "--sparsities=0.5"], "give each once"),
    "sparsity twice": (["--sparsities=0.5,0.50"], "give each once"),
    "no seeds": (["--sparsities=0.5", "--seeds="], "--seeds"),
    "no methods": (["--sparsities=0.5", "--methods="], "is not a name or a call"),
    "an allocation that goes with nothing": (
        ["--methods=flap,llmrank", "--sparsities=0.5", "--allocations=uniform,owl"],
        "owl",
    ),
    "a method that goes with nothing": (["--methods=wanda,flap", "--pattern=2:4"], "flap"),
    "its own sparsity twice": (
        ["--methods=wanda,wanda@0.5", "--sparsities=0.5"],
        "wanda-0.5-seed0 twice: give each once",
    ),
    "its own sparsity 1": (["--methods=wanda@1.0"], "must be at least 0 and less than 1"),
    "its own sparsity no number": (
        ["--methods=wanda@half"],
        "'wanda@half' is not a name or a call such as",
    ),
    "nothing to go with": (["--methods=wanda@0.5+zebra"], "allocation=zebra is unknown"),
    "two allocations": (
        ["--methods=wanda@0.5+owl+alpha"],
        "has two allocations or two refinements",
    ),
    "two refinements": (
        ["--methods=wanda@0.5+dsnot+none"],
        "has two allocations or two refinements",
    ),
    "two calls in one": (["--methods=wanda-flap"], "is not a name or a call"),
    "a refinement that goes with nothing": (
        ["--methods=flap@0.2+dsnot,wanda@0.5"],
        "--refine is for methods that prune",
    ),
    "no model": (["--sparsities=0.5", "--model="], "--model"),
    "no output": (["--sparsities=0.5", "--output="], "--output"),
    "no data": (["--sparsities=0.5", "--eval_data=/no/such.npy"], "such.npy"),
    "resources": (["--sparsities=0.5", "--resources=CPU=1"], "leave them out"),
    "no resources": (["--sparsities=0.5", "--resources=CPU"], "name=value"),
}


@pytest.mark.parametrize(("more", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_found_before_any_work(
    trial_inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(prune, "prune", None)
    assert call(argv(trial_inputs, tmp_path / "out", *more)) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ") and said in err
    assert not (tmp_path / "out" / "trials").exists()


GRIDS = {  # with how often a trial gets what a former one with another sparsity has measured
    "units": (
        ["--methods=llmrank,flap(metric='IFV',bias=False),flap(metric='WIFN',bias=False),sleb"],
        4 + 1,  # sleb's order of candidates, and its first phase
    ),
    "weights": (
        ["--methods=wanda", "--allocations=owl(m=2),owl(m=3),alpha,alpha(variant='official')"],
        4,
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_trial_equals_the_run_of_its_reports_command_to_the_bit(
    name: str, trial_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it shares steps with the trials before it."""
    memory, (flags, measured) = StepCache(), GRIDS[name]
    monkeypatch.setattr(sweep, "StepCache", lambda: memory)
    assert call(argv(trial_inputs, tmp_path / "sweep", *flags, "--sparsities=0.3,0.5")) == 0
    rows = table_of(tmp_path / "sweep")
    assert {row["state"] for row in rows.values()} == {"finished"}
    # Two sets of tokens, which are also read before the first trial, and the dense model's
    # perplexity and hidden states.
    assert memory.reused == 2 * (2 * len(rows) - 1) + 2 * (len(rows) - 1) + measured
    for trial in [
        path for path in (tmp_path / "sweep" / "trials").iterdir() if "-0.5-" in path.name
    ]:
        report = json.loads((trial / "pruning_report.json").read_text())
        words = shlex.split(report["command"])
        assert words[:3] == ["python", "-m", "launch.prune"] and f"--output={trial}" in words
        alone = [word for word in words[3:] if not word.startswith("--output=")]
        assert run(prune.options(), prune.main, [*alone, f"--output={tmp_path / 'alone'}"]) == 0
        for file in ("model.safetensors", "pruning.json", "config.json"):
            assert (tmp_path / "alone" / file).read_bytes() == (trial / file).read_bytes(), (
                f"{trial.name}: {file}"
            )
        report, again = read_report(trial), read_report(tmp_path / "alone")
        for part in ("perplexity", "agreement", "scores"):
            assert again[part] == report[part]
        assert any("a trial of a sweep" in note for note in report["notes"])
        assert not any("a trial of a sweep" in note for note in again["notes"])


SMALL = ["--methods=magnitude,wanda", "--sparsities=0.3,0.5"]


def broken(m: pytest.MonkeyPatch, name: str, error: BaseException) -> list[str]:
    """Let the trial of this name fail, and return the list of the trials that ran."""
    real = prune.prune
    ran: list[str] = []

    def one(config: prune.RunConfig, *rest: Any) -> Any:
        ran.append(Path(str(config.output)).name)
        if ran[-1] == name:
            raise error
        return real(config, *rest)

    m.setattr(prune, "prune", one)
    return ran


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("the disk\nis full: free some"), "the disk is full: free some"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
    ids=["input", "defect"],
)
def test_a_failed_trial_is_recorded_and_run_again_by_the_next_sweep(
    error: Exception,
    said: str,
    trial_inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, args = tmp_path / "out", argv(trial_inputs, tmp_path / "out", *SMALL)
    with pytest.MonkeyPatch.context() as m:
        ran = broken(m, "magnitude-0.5-seed0", error)
        assert call(args) == 1
    assert len(ran) == 4
    rows = table_of(out)
    assert [row["state"] for row in rows.values()] == ["finished", "failed", "finished", "finished"]
    assert rows["magnitude-0.5-seed0"]["error"] == said
    log = (out / "failures" / "magnitude-0.5-seed0.log").read_text()
    assert (
        log.startswith(said + "\n")
        and "python -m launch.prune --model=" in log
        and "Traceback" in log
    )
    got = capsys.readouterr()
    assert (
        f"failed: magnitude-0.5-seed0: {said}" in got.out
        and said in (out / "sweep.html").read_text()
    )
    with pytest.MonkeyPatch.context() as m:
        ran = broken(m, "none", error)
        assert call(args) == 0
    assert (
        ran == ["magnitude-0.5-seed0"] and "3 of 4 trials are finished" in capsys.readouterr().err
    )
    assert not list((out / "failures").iterdir())
    assert {row["state"] for row in table_of(out).values()} == {"finished"}


@pytest.mark.parametrize(("error", "code"), [(Terminated(), 143), (KeyboardInterrupt(), 130)])
def test_an_interrupted_sweep_keeps_finished_trials_and_resumes(
    error: BaseException, code: int, trial_inputs: Path, tmp_path: Path
) -> None:
    out, args = tmp_path / "out", argv(trial_inputs, tmp_path / "out", *SMALL)
    with pytest.MonkeyPatch.context() as m:
        broken(m, "wanda-0.3-seed0", error)
        assert call(args) == code
    assert [row["state"] for row in table_of(out).values()] == [
        "finished",
        "finished",
        "waiting",
        "waiting",
    ]
    assert (out / "sweep.html").is_file() and not (out / "failures").exists()
    before = (out / "trials" / "magnitude-0.3-seed0" / "model.safetensors").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as m:
        ran = broken(m, "none", error)
        assert call(args) == 0
    assert ran == ["wanda-0.3-seed0", "wanda-0.5-seed0"]
    assert (
        out / "trials" / "magnitude-0.3-seed0" / "model.safetensors"
    ).stat().st_mtime_ns == before


def test_interrupted_trials_of_other_code_fail_until_they_start_over(
    trial_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Samples:
        raise Terminated

    out = tmp_path / "out"
    args = argv(trial_inputs, out, "--methods=magnitude,wanda", "--sparsities=0.5")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(prune, "samples", interrupt)
        assert call(args) == 143
    monkeypatch.setattr(resume, "code_digests", lambda _: {"code of pruning": "other"})
    assert call(args) == 1
    rows = table_of(out)
    assert [row["state"] for row in rows.values()] == ["failed", "finished"]
    assert "--noresume" in rows["magnitude-0.5-seed0"]["error"]
    # A worker that takes a trial over from a lost one continues it, also here.
    values = sweep.options().parse([*args, "--noresume"])
    assert all(trial.config.resume for trial in sweep.grid(values, out))
    assert call([*args, "--noresume"]) == 0
    assert {row["state"] for row in table_of(out).values()} == {"finished"}
    finished = out / "trials" / "wanda-0.5-seed0" / "pruning_report.json"
    before = finished.stat().st_mtime_ns
    assert call([*args, "--noresume"]) == 0 and finished.stat().st_mtime_ns == before


def test_a_finished_trial_with_other_settings_is_refused(
    trial_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, args = (
        tmp_path / "out",
        argv(trial_inputs, tmp_path / "out", "--methods=magnitude", "--sparsities=0.3"),
    )
    assert call(args) == 0
    before = (out / "sweep.csv").read_bytes()
    assert call([*args, "--sparsities=0.3,0.5", "--eval_windows=1"]) == 2
    assert "another --eval_windows (0, now 1)" in capsys.readouterr().err
    assert (out / "sweep.csv").read_bytes() == before
    assert call([*args, "--sparsities=0.3,0.5"]) == 0  # a grid may grow
    assert list(table_of(out)) == ["magnitude-0.3-seed0", "magnitude-0.5-seed0"]


def test_an_impossible_combination_is_left_out_with_its_reason(
    trial_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = argv(
        trial_inputs,
        tmp_path / "out",
        "--methods=magnitude,sleb(blocks=1)",
        "--sparsities=0.5",
        "--allocations=uniform,alpha",
    )
    assert call(args) == 0
    states = {name: row["state"] for name, row in table_of(tmp_path / "out").items()}
    (left_out,) = [name for name, state in states.items() if state == "left out"]
    assert left_out.startswith("sleb_") and "-alpha-" in left_out and len(states) == 4
    assert f"left out: {left_out}: --allocation is for weight methods" in capsys.readouterr().err


def test_a_directory_of_other_files_is_left_alone(
    trial_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert call(argv(trial_inputs, tmp_path, *SMALL)) == 2
    assert "not an earlier result" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_two_sweeps_cannot_write_one_directory(
    trial_inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = argv(trial_inputs, tmp_path / "out", "--methods=magnitude", "--sparsities=0.3")
    monkeypatch.setattr(prune, "prune", lambda *_: call(args))
    call(args)
    assert "another run is writing it" in capsys.readouterr().err


def test_compiled_programs_are_dropped_now_and_then(
    trial_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = []
    monkeypatch.setattr(trials, "CLEAR_EVERY", 2)
    monkeypatch.setattr(trials.jax, "clear_caches", lambda: dropped.append(True))
    broken(monkeypatch, "magnitude-0.3-seed0", ValueError())
    assert (
        call(
            argv(
                trial_inputs,
                tmp_path / "out",
                "--methods=magnitude",
                "--sparsities=0.3",
                "--seeds=0,1,2",
            )
        )
        == 1
    )
    assert len(dropped) == 1
