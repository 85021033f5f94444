"""Targets as users write them."""

import pytest

from launch.targets.syntax import EXAMPLES, Target, parse_target
from models.errors import InputError


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("params=100M", 100e6),
        ("params=0.1B", 100e6),
        ("params=104857600", 104857600),
        ("params=1.5k", 1500),
        ("weights=400MiB", 400 * 2**20),
        ("weights=400 mib", 400 * 2**20),
        ("weights=0.4GB", 4e8),
        ("weights=419430400", 419430400),
        ("weights=2TiB", 2 * 2**40),
    ],
)
def test_amounts_have_the_units_of_counts_and_of_bytes(text: str, amount: float) -> None:
    target = parse_target(text)
    assert target.amount == target.limit == amount
    assert target.kind == text.partition("=")[0] and target.workload == ""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("memory=1.2GiB@8x4096", (1.2 * 2**30, 8, 4096, "8x4096")),
        ("latency=1.3x", (1.3, 1, 512, "decode:1x512")),
        ("latency=1.3", (1.3, 1, 512, "decode:1x512")),
        ("latency=2x@8x64", (2.0, 8, 64, "decode:8x64")),
        ("latency=1.5x@prefill:4x1024", (1.5, 4, 1024, "prefill:4x1024")),
    ],
)
def test_texts_follow_an_at_sign(text: str, wanted: tuple[float, int, int, str]) -> None:
    target = parse_target(text)
    assert (target.amount, target.batch, target.length, target.workload) == wanted


def test_a_speedup_is_the_share_of_the_dense_time() -> None:
    target = parse_target("latency=1.25x")
    assert target.limit == 0.8 and target.show(0.8) == "1.25x" and target.value(0.5) == 2.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("100M", "is no target: give one such as params=100M"),
        ("parms=100M", "has no kind 'parms'"),
        ("params=", "has no amount in ''"),
        ("params=100MiB", "has no amount in '100MiB'"),
        ("params=-3M", "has no amount in '-3M'"),
        ("params=nan", "has no amount in 'nan'"),
        ("params=1e8", "has no amount in '1e8'"),
        ("params=0", "asks for nothing at all"),
        ("params=100M@8x4096", "takes no texts"),
        ("weights=1Q", "has no amount in '1Q'"),
        ("weights=٤MB", "has no amount"),
        ("memory=1GiB", "needs the texts that the cache holds: give memory=1GiB@BATCHxLENGTH"),
        ("memory=1GiB@", "has no texts in ''"),
        ("memory=1GiB@8", "has no texts in '8'"),
        ("memory=1GiB@0x4", "has no texts in '0x4'"),
        ("memory=1GiB@99999999x4", "has no texts"),
        ("memory=1GiB@prefill:8x4", "is for no part of the work such as prefill"),
        ("latency=1x", "has no speed-up in '1x'"),
        ("latency=0.5x", "has no speed-up"),
        ("latency=30ms", "has no speed-up in '30ms'"),
        ("latency=2x@", "has no texts in ''"),
        ("latency=2x@encode:1x2", "has no texts in 'encode:1x2'"),
    ],
)
def test_what_is_no_target_says_what_to_write(text: str, reason: str) -> None:
    with pytest.raises(InputError) as error:
        parse_target(text)
    assert str(error.value).startswith(f"target={text} ") and reason in str(error.value)


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_nearest_target_that_is_named_is_one_that_can_be_met(text: str) -> None:
    target = parse_target(text)
    costs = (
        [0.9876, 0.5]
        if target.kind == "latency"
        else [123_456_789, 1650 << 20, 1_048_577, 3_000, 2_000 * 10**6]
    )
    for cost in costs:
        nearest = parse_target(target.reachable(cost))
        assert nearest.kind == target.kind and nearest.workload == target.workload
        assert cost <= nearest.limit <= 1.011 * cost


def test_sizes_are_shown_in_binary_units_and_counts_whole() -> None:
    assert Target("", "params", 1).show(134_515_008) == "134,515,008"
    assert Target("", "weights", 1).show(400 * 2**20) == "400.00 MiB"
    assert Target("", "memory", 1).show(1.25 * 2**30) == "1.25 GiB"
    assert Target("", "weights", 1).show(12) == "12.00 B"
