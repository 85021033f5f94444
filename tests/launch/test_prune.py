"""The command on small random models: its output, its messages, and its failures."""

import importlib.util
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from calibration.tokenizer import TextTokenizer
from launch import evaluate, prune
from launch.flags.cli import frozen, run
from launch.run.job import RunConfig, resolve
from models.checkpoint import orbax as pytrees
from models.checkpoint.hub import EMBEDDED
from models.checkpoint.reader import in_memory, open_checkpoint
from models.checkpoint.writer import save
from models.init import init_model
from reference.prune_runs import call, report_of
from reference.tiny import assert_equal

BASE = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=32,
    initializer_range=0.2,
)
LLAMA = BASE | dict(
    model_type="llama",
    intermediate_size=64,
    num_key_value_heads=2,
    architectures=["LlamaForCausalLM"],
)
OPT = BASE | dict(
    model_type="opt",
    ffn_dim=64,
    word_embed_proj_dim=32,
    architectures=["OPTForCausalLM"],
    init_std=0.2,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `llama` and `opt` checkpoints and token files."""
    root = tmp_path_factory.mktemp("inputs")
    for config in (LLAMA, OPT):
        save(root / config["model_type"], init_model(config, jax.random.key(1)), config, root)
    rng = np.random.default_rng(0)
    np.save(root / "calib.npy", rng.integers(0, 96, (8, 24), np.int32))
    np.save(root / "eval.npy", rng.integers(0, 96, (6, 32), np.int32))
    return root


def args(inputs: Path, model: str, output: Path, *more: str) -> list[str]:
    data = [f"--calibration={inputs / 'calib.npy'}", f"--eval_data={inputs / 'eval.npy'}"]
    return [
        f"--model={inputs / model}",
        *data,
        f"--output={output}",
        "--calibration_batch=4",
        "--mesh=data=1",
        *more,
    ]


SLOW = pytest.mark.slow
CASES = [
    ("llama", "wanda", 0.5, []),
    ("opt", "magnitude", 0.5, ["--pattern=2:4"]),
    ("llama", "llmrank", 0.25, []),
]
SLOW_CASES = [
    ("opt", 'llmrank(scorer="mpr", units="rows", variant="official")', 0.25, []),
    ("llama", 'llmrank(scope="global")', 0.25, ["--mesh=data=4,model=2"]),
]


@pytest.mark.parametrize(
    ("model", "method", "sparsity", "more"),
    [*CASES, *(pytest.param(*case, marks=SLOW) for case in SLOW_CASES)],
)
def test_a_run_writes_all_of_the_contract(
    inputs: Path, tmp_path: Path, model: str, method: str, sparsity: float, more: list[str]
) -> None:
    out = tmp_path / "out"
    assert (
        call(args(inputs, model, out, f"--method={method}", f"--sparsity={sparsity}", *more)) == 0
    )
    names = {f.name for f in out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "pruning_report.json",
        "pruning.json",
        "report.html",
    } <= names
    assert [f.name for f in tmp_path.iterdir()] == ["out"], "nothing is left beside the output"
    r = report_of(out)
    for key in (
        "model",
        "method",
        "settings",
        "protocol",
        "sparsity",
        "parameters",
        "perplexity",
        "tasks",
        "seconds",
        "details",
    ):
        assert key in r
    assert set(r["seconds"]) == {"load", "calibrate_and_prune", "eval", "export"}
    compiled = r["compilation"]
    assert compiled["programs"] >= compiled["cached"] >= 0
    assert 0 < compiled["seconds"] < sum(r["seconds"].values())
    assert set(r["peak_memory_bytes"]) == {"host", "device"}
    assert {"source", "sha256", "samples", "length", "seed"} <= set(r["protocol"]["calibration"])
    assert r["sparsity"]["target"] == sparsity
    (figures,) = r["perplexity"].values()
    assert figures["tokens"] == 6 * 31 and figures["dense"] > 1 and figures["pruned"] > 1
    if "rows" not in method:
        assert r["sparsity"]["prunable"] == pytest.approx(sparsity, abs=0.01)


def test_the_output_is_what_the_report_says(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(args(inputs, "llama", out, "--method=llmrank", "--sparsity=0.25")) == 0
    r, c = report_of(out), open_checkpoint(out)
    assert c.config["intermediate_size"] == 48
    assert c.parameters == r["parameters"]["pruned"] == r["parameters"]["dense"] - 3 * 16 * 3 * 32
    removed = r["details"]["removed"]
    assert (
        removed["model.layers.1.mlp.up_proj"]
        == removed["model.layers.1.mlp.gate_proj"]
        == removed["model.layers.1.mlp.down_proj"]
    )
    gone = np.array(removed["model.layers.1.mlp.up_proj"])
    dense = open_checkpoint(inputs / "llama").model.blocks[1]
    np.testing.assert_array_equal(c.model.blocks[1].up.w, np.delete(dense.up.w, gone, axis=0))
    np.testing.assert_array_equal(c.model.blocks[1].down.w, np.delete(dense.down.w, gone, axis=1))
    record = json.loads((out / "pruning.json").read_text())["linears"][
        "model.layers.1.mlp.down_proj"
    ]
    assert record == {"rows": [], "columns": gone.tolist(), "cut": True}
    json_file = tmp_path / "e.json"
    argv = [f"--model={out}", f"--eval_data={inputs / 'eval.npy'}", f"--json={json_file}"]
    assert run(evaluate.options(), evaluate.main, argv) == 0
    again = json.loads(json_file.read_text())
    assert {"perplexity", "tasks", "protocol", "seconds"} <= set(again)
    key = str(inputs / "eval.npy")
    assert again["perplexity"][key]["dense"] == pytest.approx(
        r["perplexity"][key]["pruned"], rel=1e-6
    )


def test_wanda_report_counts_zeros_by_linear(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(args(inputs, "opt", out, "--method=wanda", "--sparsity=0.5")) == 0
    r, model = report_of(out), open_checkpoint(out).model
    w = np.asarray(model.blocks[2].fc1.w)
    assert r["sparsity"]["per_linear"]["model.decoder.layers.2.fc1"] == np.mean(w == 0) == 0.5
    record = json.loads((out / "pruning.json").read_text())
    assert record["kind"] == "weights" and record["linears"]["model.decoder.layers.2.fc1"] == {
        "zeros": w.size // 2
    }
    assert r["parameters"]["pruned"] == r["parameters"]["dense"]


def test_the_command_in_the_report_repeats_the_run(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out put"
    assert (
        call(
            args(
                inputs,
                "llama",
                out,
                '--method=llmrank(scorer="random")',
                "--sparsity=0.5",
                "--seed=3",
            )
        )
        == 0
    )
    first, weights = report_of(out), (out / "model.safetensors").read_bytes()
    words = shlex.split(first["command"])
    assert words[:3] == ["python", "-m", "launch.prune"]
    assert call(words[3:]) == 0  # an earlier result of ours under that name is replaced
    assert (out / "model.safetensors").read_bytes() == weights
    assert report_of(out)["details"] == first["details"]


@SLOW
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_blocks_of_different_widths_load_as_announced(
    layout: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the work and in the report; padding does not count as parameters."""
    out = tmp_path / "out"
    more = (f"--layout={layout}", "--output_format=orbax")
    assert (
        call(
            args(inputs, "llama", out, '--method=llmrank(scope="global")', "--sparsity=0.4", *more)
        )
        == 0
    )
    assert_equal(in_memory(pytrees.load(out)), in_memory(open_checkpoint(out).model))
    r, said = report_of(out), capsys.readouterr().err.splitlines()[0]
    kept = [64 - len(r["details"]["removed"][f"model.layers.{i}.mlp.up_proj"]) for i in range(3)]
    assert len(set(kept)) > 1 and open_checkpoint(out).config["intermediate_size"] == max(kept)
    own = layout == "auto"
    said_in = "notes" if own else "warnings"
    assert r["loads_as"] == said.removeprefix("the result will load as ")
    assert r["loads_as"].startswith("topiary_llama, a class" if own else "stock llama")
    assert (out / "modeling_pruned.py").exists() == own
    assert any(("trust_remote_code" if own else "zero padding") in w for w in r[said_in])
    assert r["loading"]["trust_remote_code"] == own
    stored = r["parameters"]["pruned"] + (0 if own else 3 * 32 * (3 * max(kept) - sum(kept)))
    assert open_checkpoint(out).parameters == stored
    assert r["parameters"]["pruned"] == r["parameters"]["dense"] - 3 * 32 * (3 * 64 - sum(kept))


@pytest.mark.slow
def test_bfloat16_output_takes_two_bytes_a_parameter(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        call(args(inputs, "llama", out, "--method=wanda", "--sparsity=0.5", "--dtype=bfloat16"))
        == 0
    )
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    c = open_checkpoint(out, jax.numpy.bfloat16)
    assert c.stored_bytes < 2.1 * c.parameters + 20_000


@pytest.mark.parametrize(
    "allocation",
    ["owl(m=2, lam=0.1)", *(pytest.param(a, marks=SLOW) for a in ("alpha", "neuroal(samples=4)"))],
)
def test_an_allocation_is_exact_and_reported(inputs: Path, tmp_path: Path, allocation: str) -> None:
    out = tmp_path / "out"
    assert (
        call(
            args(
                inputs,
                "llama",
                out,
                "--method=wanda",
                "--sparsity=0.6",
                f"--allocation={allocation}",
            )
        )
        == 0
    )
    r = report_of(out)
    unit = 64 / (
        3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    )  # one input less of the widest linear
    assert r["sparsity"]["prunable"] == pytest.approx(0.6, abs=unit)
    assert len(r["details"]["block_sparsity"]) == 3
    if allocation.startswith("neuroal"):
        assert {"block_lambda", "row_lambda", "block_scores", "row_scores"} <= r["details"].keys()
    assert "<h2>Allocation</h2>" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_refinement_is_another_mask_of_the_same_sparsity(inputs: Path, tmp_path: Path) -> None:
    plain, refined = tmp_path / "plain", tmp_path / "refined"
    assert call(args(inputs, "opt", plain, "--method=wanda", "--sparsity=0.5")) == 0
    assert (
        call(args(inputs, "opt", refined, "--method=wanda", "--sparsity=0.5", "--refine=dsnot"))
        == 0
    )
    assert report_of(plain)["sparsity"] == report_of(refined)["sparsity"]
    assert (
        report_of(refined)["settings"]["refine"] == "dsnot"
        and "--refine=dsnot" in report_of(refined)["command"]
    )
    assert (plain / "model.safetensors").read_bytes() != (
        refined / "model.safetensors"
    ).read_bytes()


BAD = {
    "no model": (["--method=wanda", "--sparsity=0.5", "--model="], "--model"),
    "no output": (["--method=wanda", "--sparsity=0.5", "--output="], "--output"),
    "no sparsity": (["--method=wanda"], "--sparsity"),
    "sparsity 1": (["--method=wanda", "--sparsity=1"], "less than 1"),
    "negative": (["--method=wanda", "--sparsity=-0.1"], "at least 0"),
    "nan": (["--method=wanda", "--sparsity=nan"], "less than 1"),
    "unknown method": (
        ["--method=zebra", "--sparsity=0.5"],
        "there are admm, flap, llmrank, magnitude, ",
    ),
    "unknown parameter": (["--method=wanda(zebra=1)", "--sparsity=0.5"], "no parameter"),
    "unknown allocation": (["--method=wanda", "--sparsity=0.5", "--allocation=zebra"], "uniform"),
    "allocation with a pattern": (
        ["--method=wanda", "--pattern=2:4", "--allocation=owl"],
        "leave one of them out",
    ),
    "allocation of a unit method": (
        ["--method=llmrank", "--sparsity=0.5", "--allocation=owl"],
        "weight methods",
    ),
    "unknown refinement": (["--method=wanda", "--sparsity=0.5", "--refine=zebra"], "dsnot"),
    "refinement with a pattern": (
        ["--method=wanda", "--pattern=2:4", "--refine=dsnot"],
        "does not allow",
    ),
    "refinement of a unit method": (
        ["--method=llmrank", "--sparsity=0.5", "--refine=dsnot"],
        "leave it out",
    ),
    "bad pattern": (["--method=wanda", "--pattern=9:4"], "--pattern"),
    "pattern against sparsity": (
        ["--method=wanda", "--pattern=2:4", "--sparsity=0.7"],
        "leave --sparsity out",
    ),
    "pattern of a unit method": (["--method=llmrank", "--pattern=2:4"], "weight methods"),
    "pattern that does not divide": (["--method=wanda", "--pattern=3:5"], "multiple of 5"),
    "gamma out of range": (["--method=llmrank(gamma=2.0)", "--sparsity=0.5"], "between 0 and 1"),
    "missing data": (["--method=wanda", "--sparsity=0.5", "--eval_data=/no/such.npy"], "such.npy"),
    "batch against mesh": (["--method=wanda", "--sparsity=0.5", "--mesh=data=8"], "multiple of 8"),
    "too many devices": (["--method=wanda", "--sparsity=0.5", "--mesh=data=999"], "--mesh"),
    "too many blocks": (["--method=sleb(blocks=3)"], "ask for 1 or fewer"),
}
BAD_LATE = {  # found only by the search
    "rows of one threshold": (
        ["--method=magnitude", "--sparsity=0.5", '--allocation=neuroal(step="row")'],
        'step="block"',
    ),
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
    def work(*args: Any) -> None:
        raise AssertionError("the dense model was evaluated")

    monkeypatch.setattr("launch.run.measure.evaluate", work)
    test_bad_input_is_one_line_and_leaves_nothing(inputs, tmp_path, capsys, more, said)


@pytest.mark.parametrize(("more", "said"), BAD_LATE.values(), ids=BAD_LATE)
def test_bad_input_is_one_line_and_leaves_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert call(args(inputs, "llama", tmp_path / "out", *more)) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ") and said in err
    assert not list(tmp_path.iterdir())


def test_windows_longer_than_learned_positions_are_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(inputs / "long.npy", np.zeros((2, 33), np.int32))
    assert (
        call(
            args(
                inputs,
                "opt",
                tmp_path / "out",
                "--method=wanda",
                "--sparsity=0.5",
                f"--eval_data={inputs / 'long.npy'}",
            )
        )
        == 2
    )
    assert "32 positions" in capsys.readouterr().err


def test_a_directory_that_is_not_ours_is_not_overwritten(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert call(args(inputs, "llama", tmp_path, "--method=wanda", "--sparsity=0.5")) == 2
    assert "not an earlier result" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_failure_on_the_way_leaves_the_earlier_result(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    argv = args(inputs, "llama", out, "--method=wanda", "--sparsity=0.5")
    assert call(argv) == 0
    before = (out / "pruning_report.json").read_bytes()

    def fail(*_: Any) -> None:
        raise RuntimeError("the power went")

    with monkeypatch.context() as m:
        m.setattr("launch.report.files.write_durably", fail)
        with pytest.raises(RuntimeError):
            call(argv)
    assert (out / "pruning_report.json").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        ".out.unfinished",
        "out",
    ]  # what was finished waits for another attempt
    assert call(argv) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_what_decorates_a_report_never_costs_the_checkpoint(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from launch.run import export

    def fail(*_: Any) -> None:
        raise TypeError("odd\nfile")

    monkeypatch.setattr(export.RoundTripCheck, "difference", lambda *_, **__: 0.1)
    monkeypatch.setattr(export, "_transformers_logits", fail)
    monkeypatch.setattr("launch.prune.samples", fail)
    monkeypatch.setattr("launch.report.html.write_html", fail)
    out = tmp_path / "out"
    assert call(args(inputs, "llama", out, "--method=wanda", "--sparsity=0.5")) == 0
    report, printed = report_of(out), capsys.readouterr().out
    assert report["checks"]["topiary"] is False
    expected = ["gives other logits", "no sample texts: odd", "no report.html: odd"]
    if importlib.util.find_spec("torch"):
        expected.append(
            "transformers does not reproduce the logits: cannot load it (TypeError: odd"
        )
    for line in expected:
        assert sum(line in warning for warning in report["warnings"]) == 1
        assert line in printed
    assert not (out / "report.html").exists()


@pytest.mark.parametrize("output_format", ["hf", "orbax"])
def test_files_are_readable_as_the_umask_says(
    output_format: str, inputs: Path, tmp_path: Path, no_transformers: None, no_samples: None
) -> None:
    before = os.umask(0o027)
    try:
        argv = args(inputs, "llama", tmp_path / "out", "--method=wanda", "--sparsity=0.5")
        assert call([*argv, f"--output_format={output_format}"]) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["", "null", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, [2]]}'],
    ids=["empty", "null", "text", "nested"],
)
def test_odd_generation_settings_are_one_warning(text: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED / "tiny-llama", model)
    (model / "generation_config.json").write_text(text)
    argv = ["--method=magnitude", "--sparsity=0.5", "--calibration_samples=2"]
    argv += ["--calibration_length=16", "--eval_length=16", "--eval_windows=2"]
    assert call([f"--model={model}", f"--output={tmp_path / 'out'}", *argv]) == 0
    warnings = [w for w in report_of(tmp_path / "out")["warnings"] if "generation_config" in w]
    assert len(warnings) == 1 and warnings[0].startswith("no sample texts: "), warnings


def test_a_tokenizer_that_cannot_encode_is_one_warning(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """Stands for a panic in Rust."""

    def encode(text: str, special: bool) -> list[int]:
        raise PanicException("index out of bounds")

    broken = TextTokenizer(encode, lambda ids: "")
    monkeypatch.setattr("launch.run.samples.has_tokenizer", lambda directory: True)
    monkeypatch.setattr("launch.run.measure.load_tokenizer", lambda directory: broken)
    out = tmp_path / "out"
    assert call(args(inputs, "llama", out, "--method=wanda", "--sparsity=0.5")) == 0
    assert "no sample texts: index out of bounds" in report_of(out)["warnings"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "code", "says"),
    [
        ({"PYTHONIOENCODING": "ascii"}, 0, ""),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 0, ""),
        ({"JAX_ENABLE_X64": "1"}, 2, "error: JAX's 64-bit mode is on (JAX_ENABLE_X64)"),
    ],
    ids=["ascii", "C locale", "64 bits"],
)
def test_a_run_in_another_environment_ends_well(
    setting: dict[str, str], code: int, says: str, inputs: Path, tmp_path: Path
) -> None:
    # In the C locale a name in other letters is not valid UTF-8.
    out = tmp_path / ("out" if "LC_ALL" in setting else "größe")
    argv = args(inputs, "llama", out, "--method=wanda", "--sparsity=0.5")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "launch.prune", *argv],
        cwd=root,
        env={**os.environ, **setting},
        capture_output=True,
        timeout=300,
    )
    error = done.stderr.decode()
    assert done.returncode == code, error
    assert "Traceback" not in error and says in error
    assert (out / "report.html").exists() == (code == 0)
    if code:
        assert len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_full_disk_is_foreseen_before_any_pruning(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("launch.run.places.shutil.disk_usage", lambda directory: usage)
    for method, code in (("wanda", 2), ("sleb(blocks=1)", 0)):
        argv = args(inputs, "llama", tmp_path / "out", f"--method={method}", "--sparsity=0.5")
        assert call(argv) == code
        assert ("MiB free, and the result takes" in capsys.readouterr().err) == bool(code)


def test_every_flag_file_parses_and_builds() -> None:
    root = Path(__file__).parents[2]
    files = sorted((root / "configs").glob("*.flags"))
    assert root / "configs" / "llmrank.flags" in files
    for file in files:
        text = file.read_text()
        assert text.startswith("#") and "python -m launch." in text, (
            f"{file} must open with its command"
        )
        if "launch.prune" in text:
            values = prune.options().parse([f"--flagfile={file}"])
            resolve(frozen(RunConfig, values))


def test_a_number_of_blocks_needs_no_sparsity(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(args(inputs, "llama", out, "--method=sleb(blocks=1)")) == 0
    r = report_of(out)
    assert len(r["details"]["removal_order"]) == 1 and r["sparsity"]["target"] == pytest.approx(
        1 / 3
    )
    assert r["sparsity"]["prunable"] == pytest.approx(1 / 3) and not any(
        "the target was" in w for w in r["warnings"]
    )


MISTAKES = {
    "sparsity of 2": (["--sparsity=2"], "--sparsity=2 must", "give the fraction to remove"),
    "no sparsity": ([], "--sparsity", "give the fraction to remove"),
    "unknown method": (["--method=zebra"], "--method=zebra", "there are admm, flap, llmrank"),
    "unknown parameter": (
        ["--method=wanda(a=1)"],
        "--method=wanda(a=1)",
        "has no parameter 'a': it has",
    ),
    "wrong type": (['--method=flap(metric="x")'], "--method=flap", "give one of 'IFV'"),
    "unknown allocation": (["--allocation=zebra"], "--allocation=zebra", "there are alpha"),
    "unknown refinement": (["--refine=zebra"], "--refine=zebra", "there are dsnot"),
    "pattern of 3:2": (["--pattern=3:2"], "--pattern=3:2", "unstructured"),
    "pattern with an allocation": (
        ["--pattern=2:4", "--allocation=owl"],
        "--pattern=2:4",
        "--allocation spreads it: leave one of them out",
    ),
    "pattern against sparsity": (
        ["--pattern=2:4", "--sparsity=0.7"],
        "--sparsity=0.7",
        "contradicts --pattern=2:4, which removes 0.5: leave --sparsity out",
    ),
    "equal draws": (
        ["--sparsity=0.5", "--calibration_draws=2"],
        "--calibration_draws=2",
        "give text to draw windows from",
    ),
    "missing model": (["--sparsity=0.5", "--model=/no/such/dir"], "--model=/no/such/dir", "dir"),
    "no output": (["--sparsity=0.5", "--output="], "--output", "give the directory to write"),
}


@pytest.mark.parametrize(("more", "subject", "remedy"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_the_flag(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    subject: str,
    remedy: str,
) -> None:
    assert call(args(inputs, "llama", tmp_path / "out", "--method=wanda", *more)) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"error: {subject}") and remedy in err and "\n" not in err
    assert not list(tmp_path.iterdir())
