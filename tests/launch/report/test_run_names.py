"""A run's name says what was done and how much, and is no other run's."""

from typing import Any

from launch.report import run_names


def report(method: str, target: float | None = 0.5, **settings: Any) -> dict[str, Any]:
    return {"method": method, "sparsity": {"target": target}, "settings": settings}


def names(*reports: dict[str, Any]) -> list[str]:
    return run_names.of_reports(reports, [f"out/run{k}/" for k in range(len(reports))])


def test_a_name_has_the_sparsity_or_the_pattern_and_what_is_not_the_default() -> None:
    assert names(
        report("wanda", 0.5, pattern="unstructured", allocation="uniform", refine="none"),
        report("wanda", 0.5, pattern="2:4"),
        report("flap(bias=False)", 0.2),
        report("wanda", 0.7, allocation="owl(m=7)", refine="dsnot"),
        report("magnitude", None),
    ) == [
        "wanda 50%",
        "wanda 2:4",
        "flap(bias=False) 20%",
        "wanda 70%, owl(m=7), dsnot",
        "magnitude",
    ]


def test_runs_of_one_name_are_told_apart_by_their_settings_or_their_directory() -> None:
    assert names(
        report("wanda", seed=0, calibration="/a/c4.npy", output="x"),
        report("wanda", seed=1, calibration="/a/c4.npy", output="y"),
        report("flap", seed=0),
        report("flap", seed=0),
    ) == [
        "wanda 50%, seed 0",
        "wanda 50%, seed 1",
        "flap 50%, run2",
        "flap 50%, run3",
    ]


def test_arguments_are_left_out_where_the_name_stays_its_own() -> None:
    given = [
        'flap(metric="WIFN") 20%',
        "admm(targets=f(x)) 50%, owl(m=7)",
        "sleb(blocks=2) 10%",
        "sleb(blocks=2, repair=1) 10%",
    ]
    assert list(run_names.short(given).values()) == ["flap 20%", "admm 50%, owl", *given[2:]]
