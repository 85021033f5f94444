"""Latency: a table of block shapes from a stopwatch that is injected, so nothing is timed."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import pytest

from launch.targets import latency
from launch.targets.latency import (
    BlockTimes,
    Curve,
    LatencyTable,
    Workload,
    measure_table,
    shapes_of,
    steady,
)
from launch.targets.resolve import aim_at
from launch.targets.shapes import Subject
from launch.targets.sizes import Storage
from launch.targets.syntax import parse_target
from models.arch import Model
from models.checkpoint.output_format import Shape
from models.errors import InputError
from pruning.methods import METHODS
from pruning.types import Request
from reference.small import CONFIGS, MORE_CONFIGS

WORK = Workload("decode", 1, 8, "float32")
FLOAT32 = Storage("float32", "none")


def entries(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def by_entries(models: Mapping[str, Model], work: Workload) -> dict[str, list[float]]:
    """A machine that takes a second a parameter, and slows down from run to run."""
    return {
        name: [drift * float(entries((m.non_block, m.blocks))) for drift in (1, 2, 4)]
        for name, m in models.items()
    }


def subject(family: str, method: str, **arguments: Any) -> Subject:
    config = {**CONFIGS, **MORE_CONFIGS}[family]
    return Subject(config, METHODS[method](**arguments), Request(0.0), "auto")


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_a_machine_of_one_speed_is_predicted_exactly(family: str) -> None:
    """Where time is linear in parameters, so is what lies between the measured widths."""
    own = subject(family, "flap", structure="UL-UM", bias=False)
    table = measure_table(own.dense, ["heads", "neurons"], WORK, by_entries)
    for sparsity in (0.0, 0.2, 0.4, 0.5):
        written = own.at(sparsity) if sparsity else own.dense
        assert table.seconds(written) == pytest.approx(2 * written.parameters, rel=1e-6)


def test_blocks_with_experts_have_times_of_their_own() -> None:
    own = subject("qwen3_moe", "reap")
    table = measure_table(own.dense, ["experts"], WORK, by_entries)
    assert set(table.blocks) == {False, True}
    for written in (own.dense, own.at(0.5)):
        # The router's rows are no unit, but shrink with the experts.
        assert table.seconds(written) == pytest.approx(2 * written.parameters, rel=1e-6)


def test_a_table_survives_the_file_of_an_unfinished_run() -> None:
    own = subject("qwen3_moe", "reap")
    table = measure_table(own.dense, ["experts", "heads"], WORK, by_entries)
    again = LatencyTable.from_json(table.to_json("a device"))
    assert again.seconds(own.at(0.5)) == table.seconds(own.at(0.5))


def test_a_drift_of_the_machine_cancels_in_pairs() -> None:
    runs = {"dense": [1.0, 2.0, 4.0], "narrow": [0.5, 1.0, 2.0], "odd": [3.0, 6.0, 0.1]}
    assert steady(runs, "dense") == {"dense": 2.0, "narrow": 1.0, "odd": 6.0}


def test_noise_never_makes_a_narrower_block_slower() -> None:
    def noisy(models: Mapping[str, Model], work: Workload) -> dict[str, list[float]]:
        times = by_entries(models, work)
        return {n: [t * (9 if n == "12 neurons" else 1) for t in own] for n, own in times.items()}

    own = subject("llama-gqa", "flap", structure="UL-UM", bias=False)
    curve = measure_table(own.dense, ["neurons"], WORK, noisy).blocks[False].curves["neurons"]
    assert list(curve.seconds) == sorted(curve.seconds)
    assert max(curve.seconds) == curve.seconds[-1]


def test_what_attention_and_neurons_save_adds_up() -> None:
    curves = {"heads": Curve((1, 2), (6.0, 10.0)), "neurons": Curve((4, 8), (7.0, 10.0))}
    times = BlockTimes(Shape(2, 8), 3, 10.0, curves)
    assert times.at(Shape(2, 8)) == 10 and times.at(Shape(1, 4)) == 3
    assert times.at(Shape(2, 6)) == 8.5


@pytest.mark.parametrize(
    ("method", "arguments", "speedup"),
    [
        ("flap", {"structure": "UL-UM"}, 1.15),
        ("flap", {}, 1.2),
        ("llmrank", {}, 1.1),
        ("sleb", {"latter_barrier": 0}, 1.2),
    ],
)
def test_a_speedup_is_met_and_by_no_more_than_a_unit(
    method: str, arguments: dict[str, Any], speedup: float
) -> None:
    own = subject("llama-gqa", method, **arguments)
    target = parse_target(f"latency={speedup}x@1x8")
    aim = aim_at(own, target, FLOAT32, method, by_entries)
    record = aim.resolve()
    assert record["predicted"] >= speedup
    lower = [t for t in record["tried"] if t["sparsity"] < record["sparsity"]]
    assert max(t["value"] for t in lower) < speedup
    assert record["table"]["blocks"][0]["timed_together"] == 3
    assert record["texts"] == "decode:1x8"
    kept = len(shapes_of(own.at(record["sparsity"])))
    assert (kept < 3) == (method == "sleb")


def test_a_speedup_beyond_all_units_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"out of reach of llmrank, and the nearest possible is"):
        target = parse_target("latency=900x")
        aim_at(subject("llama-gqa", "llmrank"), target, FLOAT32, "llmrank", by_entries).resolve()


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_zeros_give_no_speedup_and_nothing_is_timed(method: str) -> None:
    def never(models: Mapping[str, Model], work: Workload) -> Mapping[str, Sequence[float]]:
        pytest.fail("was timed")

    with pytest.raises(InputError) as error:
        aim_at(subject("llama", method), parse_target("latency=1.3x"), FLOAT32, method, never)
    assert "whose zeros stay in place" in str(error.value)
    assert "latency=1.00x@decode:1x512" in str(error.value)


def test_learned_positions_bound_the_texts() -> None:
    with pytest.raises(InputError, match="the model has 64 positions"):
        aim_at(subject("opt", "flap"), parse_target("latency=1.3x"), FLOAT32, "flap", by_entries)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_models_are_timed_in_turn(phase: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "RUNS", 2)
    own = subject("llama-gqa", "flap")
    table = measure_table(own.dense, ["heads", "neurons"], WORK._replace(phase=phase))
    assert table.outside > 0
    assert table.blocks[False].depth == 3
    assert list(table.blocks[False].curves["heads"].units) == [1, 2]
