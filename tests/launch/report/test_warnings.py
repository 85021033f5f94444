"""Warnings say what matters; what needs no action is a note."""

from types import SimpleNamespace
from typing import Any

import pytest

from launch.report import removal


def written(padding: int = 0, blocks: int = 4, code: str | None = None) -> Any:
    return SimpleNamespace(
        padding=padding,
        loaded=SimpleNamespace(parameters=10_000, specs=[None] * blocks),
        form=SimpleNamespace(code=code, label="topiary_llama, a class"),
        topiary=SimpleNamespace(ok=True),
        transformers=SimpleNamespace(ok=True),
    )


def warnings(found: Any, reached: float = 0.5) -> list[str]:
    dense = SimpleNamespace(specs=[None] * 4, config={})
    return list(removal.warnings({"prunable": reached, "target": 0.5}, found, dense, 8))  # type: ignore[arg-type]


def test_padding_is_a_warning_only_where_it_is_a_noticeable_share() -> None:
    assert warnings(written()) == [] and list(removal.notes(written())) == []
    little, much = written(6), written(150)
    assert warnings(little) == []
    assert [note[:25] for note in removal.notes(little)] == ["6 stored values (0.06%) a"]
    assert [w[:26] for w in warnings(much)] == ["150 stored values (1.5%) a"]
    assert list(removal.notes(much)) == []


def test_a_class_that_ships_with_the_model_is_a_note() -> None:
    own = written(code="class ...")
    assert warnings(own) == [] and "topiary_llama" in next(removal.notes(own))


@pytest.mark.parametrize(
    ("reached", "blocks", "warned"),
    [(0.504, 4, False), (0.51, 4, True), (0.6, 3, False), (0.63, 3, True)],
)
def test_a_missed_target_is_a_warning_beyond_what_whole_blocks_allow(
    reached: float, blocks: int, warned: bool
) -> None:
    assert bool(warnings(written(blocks=blocks), reached)) == warned
