"""The table of plans: its rows on absent TPUs, and what it shows of a plan."""

import importlib.util
import io
import json
import pathlib
import typing
from collections import Counter

import pytest
from rich.console import Console

from launch import bench
from launch.benchmarks import plans
from launch.flags.cli import run
from models.errors import InputError
from models.published import MODELS

CONFIG = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    architectures=["LlamaForCausalLM"],
)


@pytest.fixture
def row(tmp_path: pathlib.Path) -> plans.Row:
    """A row of this machine, of a model of which there is the configuration alone."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return plans.Row(str(tmp_path), "", "data=2", 2, "wanda")


def test_a_row_is_planned_and_shown(
    row: plans.Row,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(plans.ROWS, "small", row)
    argv = ["--what=plans", "--plans=small", f"--json={tmp_path / 'plans.json'}"]
    assert run(bench.options(), bench.main, argv) == 0
    assert "small" in capsys.readouterr().out
    found = json.loads((tmp_path / "plans.json").read_text())["figures"]["small"]
    assert found["method"] == "wanda" and found["calibration"]["length"] == 2048
    found["fits"] = False
    shown = io.StringIO()
    Console(file=shown, width=200).print(plans.table({"small": found}))
    assert "does not fit" in shown.getvalue()
    assert f"{found['total']['compile_seconds']:.0f} s" in shown.getvalue()
    largest = max(found["programs"], key=lambda p: typing.cast(int, p["peak"]))
    assert largest["name"] in shown.getvalue()


def test_what_cannot_be_planned_is_said(row: plans.Row) -> None:
    with pytest.raises(InputError, match="data=3"):
        plans.plan_of(row._replace(mesh="data=3"))
    with pytest.raises(InputError, match="there are llama-2-7b"):
        plans.measure("llama-2-8b")


def test_rows_are_published_models() -> None:
    assert {row.model for row in plans.ROWS.values()} <= {name.lower() for name in MODELS}
    assert next(iter(plans.ROWS)) == "llama-2-7b_v5e:4x4_wanda" and len(plans.ROWS) == 16


@pytest.mark.slow
@pytest.mark.parametrize(("method", "gib"), [("sparsegpt", 3), ("flap", 3), ("sparsellm", 5.5)])
def test_seven_billion_fit_sixteen_chips(method: str, gib: float) -> None:
    """libtpu compiles each program once: the first block's states lie as those of the others.

    Wanda's programs are those of `test_plan.py`.
    """
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu: pip install 'jax[tpu]'")
    found = plans.plan_of(plans.ROWS[f"llama-2-7b_v5e:4x4_{method}"])
    assert found["fits"] and found["memory"]["device"]["peak"] < gib * 2**30
    times = Counter(p["name"] for p in found["programs"])
    assert times["embedding"] == 1 and times["pruned block"] <= 2  # FLAP has two kinds of blocks
