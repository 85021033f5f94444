"""Targets of size: what is chosen meets them within one unit, or the error names the nearest."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from launch.targets.resolve import Aim, aim_at, describe_shape
from launch.targets.shapes import Subject
from launch.targets.sizes import Storage, size_of
from launch.targets.syntax import parse_target
from models.errors import InputError
from pruning.methods import METHODS
from pruning.types import Request, prune
from reference.small import CONFIGS, MORE_CONFIGS, model, tokens

FLOAT32 = Storage("float32", "none")
BITMASK = Storage("float32", "bitmask")


def subject(family: str, method: str, **arguments: Any) -> Subject:
    config = {**CONFIGS, **MORE_CONFIGS}[family]
    return Subject(config, METHODS[method](**arguments), Request(0.0), "auto")


def aim(own: Subject, text: str, storage: Storage = FLOAT32) -> Aim:
    return aim_at(own, parse_target(text), storage, "the method")


def one_unit(own: Subject) -> int:
    """Most parameters that a step of any method holds: one head group, neuron and block."""
    return max(
        sum(math.prod(spec.shape) for spec in (b.k.w, b.v.w, b.q.w, b.o.w, b.up.w, b.down.w))
        for b in own.dense.blocks
    )


METHODS_OF_UNITS = [
    ("flap", {}),
    ("flap", {"structure": "AL-AM"}),
    ("llmrank", {"scope": "global"}),
    ("llmrank", {"round_to": 4}),
    ("wanda_sp", {}),
    ("wanda_sp", {"scope": "global"}),
    ("sleb", {"latter_barrier": 0}),
]


@pytest.mark.parametrize(("method", "arguments"), METHODS_OF_UNITS, ids=str)
@pytest.mark.parametrize("kind", ["params", "weights", "memory"])
def test_what_is_predicted_is_at_most_what_is_asked_and_the_step_before_is_not(
    kind: str, method: str, arguments: dict[str, Any]
) -> None:
    own = subject("llama-gqa", method, **arguments)
    texts = "@2x16" if kind == "memory" else ""
    probe = parse_target(f"{kind}=1{texts}")
    dense = size_of(probe, own.dense, FLOAT32)
    for share in (0.95, 0.85):
        record = aim(own, f"{kind}={int(share * dense)}{texts}").resolve()
        assert record["predicted"] <= int(share * dense) < dense == record["dense"]
        assert record["predicted"] == size_of(probe, own.at(record["sparsity"]), FLOAT32)
        below = [t["value"] for t in record["tried"] if t["sparsity"] < record["sparsity"]]
        assert min(below) > int(share * dense)
        assert min(below) - record["predicted"] <= 8 * one_unit(own)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("flap", {"structure": "AL-AM"}),
        pytest.param("flap", {"structure": "AL-MM", "heads_removed": 2}, marks=pytest.mark.slow),
        pytest.param("flap", {"variant": "official"}, marks=pytest.mark.slow),
        pytest.param("llmrank", {"scope": "global"}, marks=pytest.mark.slow),
        pytest.param("wanda_sp", {"scope": "global", "repair": "bias"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["params", pytest.param("memory", marks=pytest.mark.slow)])
def test_widths_that_the_data_decide_meet_the_target_too(
    kind: str, method: str, arguments: dict[str, Any]
) -> None:
    """The sparsity is settled when the units are scored: what comes out is at most what was asked.

    The search before it, on shapes, knows no scores.
    """
    own = subject("llama-gqa", method, **arguments)
    texts = "@2x16" if kind == "memory" else ""
    target = parse_target(f"{kind}=1{texts}")
    asked = int(0.85 * size_of(target, own.dense, FLOAT32))
    chosen = aim(own, f"{kind}={asked}{texts}")
    sparsity = chosen.resolve()["sparsity"]
    request = Request(sparsity, settle=chosen)
    pruned, outcome = prune(model("llama-gqa"), own.method, tokens(), request)
    record = chosen.record
    assert record["first"]["sparsity"] == sparsity
    assert outcome.asked[0]["down"] == record["sparsity"]
    numbers = sum(leaf.size for leaf in _leaves(pruned))
    cache = sum(2 * 2 * 16 * block.k.w.shape[0] for block in pruned.blocks)
    got = numbers if kind == "params" else 4 * (numbers + cache)
    # The shipped class has a bias in every block where one block has one.
    assert got <= record["predicted"] <= asked
    assert record["predicted"] - got <= 4 * 16 * 3


def _leaves(m: Any) -> list[np.ndarray]:
    import jax

    return jax.tree.leaves((m.non_block, m.blocks))


def test_experts_are_counted() -> None:
    own = subject("qwen3_moe", "reap")
    asked = int(0.8 * own.dense.parameters)
    record = aim(own, f"params={asked}").resolve()
    assert record["predicted"] <= asked
    assert "3 blocks" in record["shape"] and "experts" in record["shape"]


@pytest.mark.parametrize(
    ("method", "text", "reason"),
    [
        ("llmrank", "params=100", "is out of reach of the method, and the nearest possible is"),
        ("sleb", "params=4000", "is out of reach of the method, and the nearest possible is"),
        ("flap", "params=1M", "is met by the dense model, which has 6,"),
        ("flap", "weights=1GB", "is met by the dense model, which has"),
        ("flap", "memory=1GB@1x1", "is met by the dense model, which has"),
        ("wanda", "params=4000", "whose zeros stay in place, and the nearest possible is params="),
        ("wanda", "weights=10KB", "give `pack`=bitmask"),
        ("wanda", "memory=10KB@1x1", "choose a method that removes units or blocks"),
    ],
)
def test_a_target_that_cannot_be_met_names_the_nearest(method: str, text: str, reason: str) -> None:
    with pytest.raises(InputError) as error:
        aim(subject("llama-gqa", method), text).resolve()
    message = f"{error.value.reason}: {error.value.remedy}"
    assert reason in message and error.value.field == "target"
    assert ("pack" in message) == (method == "wanda" and not text.startswith("memory"))


def test_the_nearest_target_is_met() -> None:
    own = subject("llama-gqa", "llmrank")
    with pytest.raises(InputError) as error:
        aim(own, "params=100").resolve()
    nearest = error.value.reason.rpartition(" ")[2]
    assert aim(own, nearest).resolve()["predicted"] <= parse_target(nearest).limit


@pytest.mark.parametrize("kind", ["params", "weights"])
def test_zeros_count_where_a_pack_drops_them(kind: str) -> None:
    own = subject("llama-gqa", "wanda")
    target = parse_target(f"{kind}=1")
    asked = int(0.8 * size_of(target, own.dense, BITMASK))
    record = aim(own, f"{kind}={asked}", BITMASK).resolve()
    assert record["predicted"] <= asked and record["pack"] == "bitmask"
    # A step is one entry of each row of each linear.
    rows = sum(shape[0] for shape in own.dense.linears.values())
    assert asked - record["predicted"] <= 4 * rows


def test_rows_that_are_zeroed_are_zeros() -> None:
    own = subject("llama-gqa", "llmrank", units="rows", scorer="norm")
    with pytest.raises(InputError, match="whose zeros stay in place"):
        aim(own, "params=4000").resolve()
    assert aim(own, "params=5500", BITMASK).resolve()["predicted"] <= 5500


def test_a_padded_layout_counts_its_padding() -> None:
    """Blocks of different widths take the room of the widest in a stock class."""
    auto = subject("llama-gqa", "flap", structure="AL-AM", bias=False)
    padded = dataclasses.replace(auto, layout="padded")
    asked = int(0.9 * auto.dense.parameters)
    both = [aim(own, f"params={asked}").resolve() for own in (auto, padded)]
    assert both[1]["sparsity"] >= both[0]["sparsity"]
    assert both[1]["predicted"] <= asked


def test_a_shape_is_described_by_its_spans() -> None:
    own = subject("qwen3_moe", "reap")
    assert describe_shape(own.dense) == "3 blocks, 2 heads, 16 to 24 neurons, 4 experts"
