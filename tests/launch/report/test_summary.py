"""Numbers are formatted for a reader, odd values too, and the rows hold the report's numbers."""

import math

import pytest

from launch.report import summary


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.1, "8.100"),
        (5.47321, "5.473"),
        (1234.56, "1,234.6"),
        (54321.9, "54,322"),
        (7.3e7, "7.30e+07"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (None, "—"),
    ],
)
def test_a_perplexity_has_about_four_digits(value: float | None, text: str) -> None:
    assert summary.perplexity(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.2997, "29.97%"), (0.3, "30%"), (0, "0%"), (1.0, "100%"), (0.1, "10%"), (None, "—")],
)
def test_a_fraction_is_a_percentage_without_trailing_zeros(value: float | None, text: str) -> None:
    assert summary.percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20, "1.0 MiB"),
        (13476831232, "12.6 GiB"),
        (2**50, "1024.0 TiB"),
        (None, "—"),
    ],
)
def test_bytes_are_in_a_binary_unit(value: int | None, text: str) -> None:
    assert summary.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.42, "0.42 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (245.2, "4 min 05 s"),
        (7500, "2 h 05 min"),
        (285_120, "3.3 days"),
        (3e8, "3,472.2 days"),
        (None, "—"),
    ],
)
def test_seconds_become_minutes_hours_and_days(value: float | None, text: str) -> None:
    assert summary.duration(value) == text


@pytest.mark.parametrize(
    ("dense", "pruned", "text"),
    [
        (8.1, 9.3, "1.148x"),
        (8, 4000, "500x"),
        (1, 5e6, "5.00e+06x"),
        (8.1, math.inf, "—"),
        (math.nan, 1, "—"),
        (0, 1, "—"),
        (8, None, "—"),
    ],
)
def test_a_ratio_that_is_undefined_is_a_dash(
    dense: float | None, pruned: float | None, text: str
) -> None:
    assert summary.ratio(dense, pruned) == text


@pytest.mark.parametrize(
    ("dense", "pruned", "text"),
    [
        (100, 80, "-20.00%"),
        (100, 101, "+1.00%"),
        (100, 100, "unchanged"),
        (None, 1, "—"),
        (1, None, "—"),
    ],
)
def test_a_difference_is_relative_to_the_dense_model(
    dense: int | None, pruned: int | None, text: str
) -> None:
    assert summary.difference(dense, pruned) == text


def test_a_long_name_keeps_its_end() -> None:
    assert summary.shorten("wikitext2") == "wikitext2"
    short = summary.shorten("/data/" + "deep/" * 10 + "valid.npy")
    assert short == "…/deep/deep/valid.npy"
    assert summary.shorten("/data/" + "x" * 40) == "…" + "x" * 23


def test_a_path_is_shortened_to_its_file_name() -> None:
    assert summary.short_names(["c4", "/data/tokens/valid.npy"]) == {
        "c4": "c4",
        "/data/tokens/valid.npy": "valid.npy",
    }


def test_equal_file_names_keep_the_folders_that_tell_them_apart() -> None:
    names = ["/a/x/valid.npy", "/b/x/valid.npy", "valid.npy", "out/wanda/", "out/flap"]
    assert list(summary.short_names(names).values()) == [
        "a/x/valid.npy",
        "b/x/valid.npy",
        "valid.npy",
        "wanda",
        "flap",
    ]


def test_the_rows_hold_the_numbers_of_a_report() -> None:
    report = {
        "perplexity": {"ptb": {"dense": 8.1, "pruned": 9.3}},
        "sparsity": {"target": 0.3, "prunable": 0.2997, "total": 0.2},
        "parameters": {"dense": 1_000_000, "pruned": 800_000},
        "bytes": {"dense": 4096, "pruned": 4096},
        "seconds": {"load": 1.5, "calibrate_and_prune": 60.5, "eval": 3.0, "export": 1.0},
        "compilation": {"seconds": 4.5, "programs": 12, "cached": 9},
        "peak_memory_bytes": {"host": 2048, "device": None},
    }
    assert summary.quality_rows(report) == [
        ("Perplexity, ptb", "8.100", "9.300", "1.148x"),
        ("Sparsity, prunable", "", "29.97%", "target 30%"),
        ("Sparsity, whole model", "", "20%", ""),
        ("Parameters", "1,000,000", "800,000", "-20.00%"),
        ("Weights on disk", "4.0 KiB", "4.0 KiB", "unchanged"),
    ]
    costs = dict(summary.cost_rows(report))
    assert costs["Time, calibrate and prune"] == "1 min 00 s"
    assert costs["Time, total"] == "1 min 06 s"
    assert costs["… compilation"] == "4.50 s, 9 of 12 programs cached"
    assert costs["Peak memory, host"] == "2.0 KiB" and costs["Peak memory, device"] == "—"


def test_an_empty_report_has_rows_of_dashes() -> None:
    assert all(row.change in ("", "—") for row in summary.quality_rows({}))
    assert summary.cost_rows({}) == []
