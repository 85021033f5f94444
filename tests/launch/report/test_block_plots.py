"""Plots by block group equal linears, choose their axis, and take the page's colours."""

import re

import pytest

from launch.report import svg
from launch.report.block_plots import block_and_kind, scores_by_block, sparsity_by_block
from reference.html_page import Page


def words(text: str) -> list[str]:
    return Page(text).words


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("model.decoder.layers.11.fc1", (11, "fc1")),
        ("layers.0.kernel", (0, "kernel")),
        ("lm_head", None),
        ("model.sublayers.3.fc1", None),
    ],
)
def test_a_linears_name_splits_into_block_and_kind(
    name: str, place: tuple[int, str] | None
) -> None:
    assert block_and_kind(name) == place


def test_equal_profiles_share_a_panel_and_others_do_not() -> None:
    reached = {
        f"model.decoder.layers.{i}.{kind}": 0.5
        for i in range(2)
        for kind in ("self_attn.q_proj", "fc1", "fc2")
    }
    assert words(sparsity_by_block(reached, {}))[-2:] == ["q_proj, fc1, fc2", "50%"]
    reached["model.decoder.layers.1.fc2"] = 0.75
    texts = words(sparsity_by_block(reached, {}))
    assert "q_proj, fc1" in texts and "fc2" in texts and "50% to 75%" in texts
    texts = words(sparsity_by_block(reached, {"model.decoder.layers.0.fc1": 0.5}))
    assert "q_proj" in texts and "fc1" in texts, "a kind with a budget is not like one without"


def test_scores_choose_a_log_axis_by_their_range() -> None:
    narrow = scores_by_block({"layers.0.fc1": [1.0, 2.0, 3.0, 4.0, 5.0]}, "s")
    wide = scores_by_block({"layers.0.fc1": [0.0, 1e-4, 1e-3, 1e-2, 1.0]}, "s")
    assert not {"1e-4", "0.001", "0.01"} & set(words(narrow))
    assert {"0.001", "0.01"} <= set(words(wide))


def test_no_block_is_no_plot() -> None:
    assert sparsity_by_block({"lm_head": 0.5}, {}) == scores_by_block({}, "s") == ""


def test_plots_take_the_pages_colours() -> None:
    text = sparsity_by_block({"layers.0.attn.q": 0.5, "layers.0.fc1": 0.25}, {})
    assert "currentColor" in text and svg.BLUE in text and svg.ORANGE in text
    assert not re.search(r"#000000|#ffffff|font-family|<\?xml|<style", text)
