"""Programs run in turn, after one warm-up each."""

from launch.benchmarks import timing


def test_programs_run_in_turn_after_one_warm_up_each() -> None:
    order: list[str] = []
    seconds = timing.time_in_turn(
        {name: lambda name=name: order.append(name) for name in "ab"}, runs=3
    )
    assert "".join(order) == "ab" + "ababab"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3} and min(
        map(min, seconds.values())
    ) >= 0
