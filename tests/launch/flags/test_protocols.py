"""A protocol sets the flags of its paper, given flags win, and reports name it."""

import io
import json
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from launch import compare, evaluate, plan, prune, sweep
from launch.flags.cli import Flags, frozen, run
from launch.flags.protocols import PROTOCOLS, stamp
from launch.report import console
from launch.report import html as report
from models.checkpoint.writer import save
from models.errors import InputError
from models.init import init_model

LLAMA = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    save(root / "llama", init_model(LLAMA, jax.random.key(1)), LLAMA, root)
    rng = np.random.default_rng(0)
    for name in ("calib", "eval"):
        np.save(root / f"{name}.npy", rng.integers(0, 64, (4, 16), np.int32))
    return root


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_the_flags_of_its_row(name: str) -> None:
    """In every command that has these flags, and in the table of the documentation."""
    row, p = PROTOCOLS[name].flags, PROTOCOLS[name]
    for options in (prune.options, plan.options, sweep.options, evaluate.options):
        values = options().parse([f"--protocol={name}"])
        assert {flag: values[flag] for flag in row if flag in values} == {
            f: v for f, v in row.items() if f in values
        }
    assert sweep.options().parse([f"--protocol={name}"])["seeds"] == str(p.seed)
    cells = [
        name,
        p.calibration,
        str(p.samples),
        str(p.length),
        str(p.seed),
        p.evaluation.replace(",", ", "),
        str(p.window),
    ]
    page = (Path(__file__).parents[3] / "docs" / "protocols.md").read_text(encoding="utf-8")
    assert any([c.strip(" `") for c in line.split("|")[1:8]] == cells for line in page.splitlines())


def test_protocols_have_the_settings_of_the_papers() -> None:
    """Read in the official code: FLAP's script, Wanda's main.py, LLM-Rank's loader."""
    assert PROTOCOLS["flap128"].flags == dict(
        calibration="wikitext2",
        calibration_samples=1024,
        calibration_length=128,
        seed=0,
        eval_data="wikitext2",
        eval_length=128,
        eval_windows=0,
    )
    assert (
        PROTOCOLS["wanda2048"].calibration,
        PROTOCOLS["wanda2048"].samples,
        PROTOCOLS["wanda2048"].window,
    ) == (
        "c4",
        128,
        2048,
    )
    assert PROTOCOLS["llmrank2048"].seed == 42 and PROTOCOLS["llmrank2048"].samples == 64


@pytest.mark.parametrize("behind", [True, False], ids=["before", "behind"])
def test_a_flag_that_is_given_wins_wherever_it_stands(tmp_path: Path, behind: bool) -> None:
    """The value that is the flag's own default too."""
    (tmp_path / "some.flags").write_text("--eval_length=64\n")
    given = ["--calibration_samples=128", f"--flagfile={tmp_path / 'some.flags'}"]
    values = prune.options().parse(
        ["--protocol=flap128", *given] if behind else [*given, "--protocol=flap128"]
    )
    assert (values["calibration_samples"], values["eval_length"]) == (128, 64)
    assert (values["calibration_length"], values["calibration"]) == (128, "wikitext2")
    assert stamp("flap128", values)["overridden"] == {"calibration_samples": 128, "eval_length": 64}
    assert prune.options().parse(prune.options().given(values)) == values
    assert "--calibration_samples=128" in prune.options().given(values)


def test_without_a_protocol_nothing_is_stamped() -> None:
    assert stamp("", {"seed": 3}) == {}


def test_differences_from_the_official_code_are_in_the_report() -> None:
    values = prune.options().parse(["--protocol=sleb2048"])
    assert (
        "shuffles" in stamp("sleb2048", values)["differs"]
        and stamp("sleb2048", values)["overridden"] == {}
    )


@pytest.mark.parametrize("module", [prune, plan, sweep, evaluate])
def test_an_unknown_protocol_is_one_line_that_names_the_known(
    module: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(module.options(), module.main, ["--protocol=wanda"]) == 2  # type: ignore[attr-defined]
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and err.startswith("error: --protocol=wanda is unknown: ")
        and all(name in err for name in PROTOCOLS)
    )


def test_presets_pass_over_flags_that_a_command_lacks() -> None:
    f = Flags("launch.example", "")
    f.integer("count", 3, "how many", 1)
    f.presets("kind", {"few": {"count": 1, "size": 9}}, "a kind")
    assert f.parse(["--kind=few"])["count"] == 1 and "size" not in f.parse([])
    with pytest.raises(InputError, match="there are few"):
        f.parse(["--kind=many"])


def test_every_report_names_the_protocol(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the report, the terminal, the page, the comparison; and the command repeats it."""
    data = [
        f"--calibration={inputs / 'calib.npy'}",
        f"--eval_data={inputs / 'eval.npy'}",
        "--mesh=data=1",
    ]
    argv = [
        f"--model={inputs / 'llama'}",
        "--method=wanda",
        "--sparsity=0.5",
        *data,
        f"--output={tmp_path / 'out'}",
    ]
    values = prune.options().parse([*argv, "--protocol=wanda2048"])
    result = prune.prune(frozen(prune.RunConfig, values))
    stamped = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["protocol"]
    assert stamped["name"] == "wanda2048" and "locuslab/wanda" in stamped["source"]
    assert stamped["overridden"] == {
        "calibration": str(inputs / "calib.npy"),
        "eval_data": str(inputs / "eval.npy"),
    }
    said = f"protocol wanda2048, but {data[0]}, {data[1]}"
    terminal = Console(file=io.StringIO(), width=400)
    console.show(result, terminal)
    assert "".join(said.split()) in "".join(terminal.file.getvalue().split())  # type: ignore[attr-defined]
    page = report.render(result)
    assert (
        page.count(said) == 1 and page.count(said.replace("protocol", "Protocol", 1)) == 1
    )  # the heading, the plot of perplexity
    runs = compare.read([str(tmp_path / "out")], None)
    assert compare.rows(runs, compare.marks_of(runs))[2][-1] == said.removeprefix("protocol ")
    again = prune.options().parse(shlex.split(result["command"])[3:])
    assert again == values
    capsys.readouterr()
    assert (
        run(
            evaluate.options(),
            evaluate.main,
            [f"--model={inputs / 'llama'}", data[1], "--mesh=data=1", "--protocol=flap128"],
        )
        == 0
    )
    assert "protocolflap128,but--eval_data=" in "".join(capsys.readouterr().out.split())
