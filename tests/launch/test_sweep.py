"""Sweeps: what trials there are, that each is the run of launch.prune it says, and that nothing is lost when one fails or all stop."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from calibration.journal import StepCache
from launch import prune, sweep
from launch.flags.cli import Terminated, run
from launch.run import export
from launch.trials import trial as trials
from models.checkpoint.writer import save
from models.errors import InputError
from models.init import init_model

LLAMA = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
    initializer_range=0.3,
)


@pytest.fixture(autouse=True)
def _no_more_than_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What models say is compiled anew for every shape, and transformers takes a second a trial: nothing here is about them."""
    monkeypatch.setattr(prune, "samples", lambda *_: [])
    monkeypatch.setattr(export, "_by_transformers", lambda *_: export.Check(True, "not asked"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    save(root / "llama", init_model(LLAMA, jax.random.key(1)), LLAMA, root)
    rng = np.random.default_rng(0)
    np.save(root / "calib.npy", rng.integers(0, 64, (4, 16), np.int32))
    np.save(root / "eval.npy", rng.integers(0, 64, (2, 16), np.int32))
    return root


def argv(inputs: Path, output: Path, *more: str) -> list[str]:
    data = [
        f"--calibration={inputs / 'calib.npy'}",
        f"--eval_data={inputs / 'eval.npy'}",
        "--calibration_batch=2",
    ]
    return [f"--model={inputs / 'llama'}", *data, "--mesh=data=1", f"--output={output}", *more]


def call(args: list[str]) -> int:
    return run(sweep.options(), sweep.main, args)


def table_of(output: Path) -> dict[str, dict[str, str]]:
    with (output / "sweep.csv").open(newline="") as file:
        return {row["trial"]: row for row in csv.DictReader(file)}


def names(*more: str) -> list[str]:
    """The trials of a grid, in order."""
    values = sweep.options().parse(["--model=m", *more])
    return [trial.name for trial in sweep.grid(values, Path("out"))]


def test_a_grid_is_every_combination_a_seed_after_the_other() -> None:
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


def test_a_method_may_say_its_own_sparsity_allocation_and_refinement() -> None:
    got = names(
        "--methods=wanda,wanda@0.5,flap(bias=False)@0.2,wanda+owl(m=7, lam=0.1),sparsegpt@0.6 + dsnot,wanda@0.5+alpha+dsnot",
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


def test_a_trial_of_its_own_settings_is_the_run_that_it_says(inputs: Path, tmp_path: Path) -> None:
    methods = ["--methods=wanda@0.5+owl+dsnot,sleb(blocks=1),flap@0.3", "--seeds=3"]
    assert call(argv(inputs, tmp_path / "out", *methods)) == 0
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


def test_a_method_that_counts_has_one_trial_whatever_the_sparsities() -> None:
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
    "sparsity 1": (["--sparsities=0.5,1"], "fractions from 0 to below 1"),
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
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(prune, "prune", None)
    assert call(argv(inputs, tmp_path / "out", *more)) == 2
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
def test_a_trial_is_to_the_bit_the_run_that_its_report_says(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it shares with those before it; and it does share."""
    memory, (flags, measured) = StepCache(), GRIDS[name]
    monkeypatch.setattr(sweep, "Memory", lambda: memory)
    assert call(argv(inputs, tmp_path / "sweep", *flags, "--sparsities=0.3,0.5")) == 0
    rows = table_of(tmp_path / "sweep")
    assert {row["state"] for row in rows.values()} == {"finished"}
    # Twice two sets of tokens (they are also read before the first trial), and the dense perplexity.
    assert memory.reused == 2 * (2 * len(rows) - 1) + len(rows) - 1 + measured
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
        again = json.loads((tmp_path / "alone" / "pruning_report.json").read_text())
        assert again["perplexity"] == report["perplexity"] and again["scores"] == report["scores"]
        assert any("a trial of a sweep" in w for w in report["warnings"])
        assert not any("a trial of a sweep" in w for w in again["warnings"])


SMALL = ["--methods=magnitude,wanda", "--sparsities=0.3,0.5"]


def broken(m: pytest.MonkeyPatch, name: str, error: BaseException) -> list[str]:
    """Have the trial of this name fail; the names of those that were run."""
    real, ran = prune.prune, []  # type: Callable[..., Any], list[str]

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
def test_a_failure_is_recorded_the_rest_goes_on_and_it_is_tried_again(
    error: Exception, said: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, args = tmp_path / "out", argv(inputs, tmp_path / "out", *SMALL)
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
def test_an_interrupted_sweep_keeps_what_is_finished_and_goes_on(
    error: BaseException, code: int, inputs: Path, tmp_path: Path
) -> None:
    out, args = tmp_path / "out", argv(inputs, tmp_path / "out", *SMALL)
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


def test_a_finished_trial_of_other_settings_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, args = (
        tmp_path / "out",
        argv(inputs, tmp_path / "out", "--methods=magnitude", "--sparsities=0.3"),
    )
    assert call(args) == 0
    before = (out / "sweep.csv").read_bytes()
    assert call([*args, "--sparsities=0.3,0.5", "--eval_windows=1"]) == 2
    assert "another --eval_windows (0, now 1)" in capsys.readouterr().err
    assert (out / "sweep.csv").read_bytes() == before
    assert call([*args, "--sparsities=0.3,0.5"]) == 0  # a grid may grow
    assert list(table_of(out)) == ["magnitude-0.3-seed0", "magnitude-0.5-seed0"]


def test_a_combination_that_cannot_be_is_left_out_and_said(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = argv(
        inputs,
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


def test_a_directory_that_is_not_ours_is_left_alone(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert call(argv(inputs, tmp_path, *SMALL)) == 2
    assert "not an earlier result" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_two_sweeps_do_not_write_one_place(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = argv(inputs, tmp_path / "out", "--methods=magnitude", "--sparsities=0.3")
    monkeypatch.setattr(prune, "prune", lambda *_: call(args))
    call(args)
    assert "another run is writing it" in capsys.readouterr().err


def test_compiled_programs_are_dropped_now_and_then(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = []
    monkeypatch.setattr(trials, "FORGET", 2)
    monkeypatch.setattr(trials.jax, "clear_caches", lambda: dropped.append(True))
    broken(monkeypatch, "magnitude-0.3-seed0", ValueError())
    assert (
        call(
            argv(
                inputs, tmp_path / "out", "--methods=magnitude", "--sparsities=0.3", "--seeds=0,1,2"
            )
        )
        == 1
    )
    assert len(dropped) == 1
