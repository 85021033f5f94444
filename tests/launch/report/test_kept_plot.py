"""Pictures of kept units: each cell is the share that is left, and each kind that a report tells of is drawn."""

import base64
import io
import re

import numpy as np
import pytest

from launch.report import html as report
from launch.report.kept_plot import COLUMNS, pictures, shares


def test_a_cell_is_the_share_that_is_left() -> None:
    np.testing.assert_array_equal(shares([[0, 2], []], 3), [[1, 0, 1], [0, 0, 0]])
    many = shares([range(0, 1000, 2)], 1000)
    assert many.shape == (1, COLUMNS) and many.min() >= 1 / 4 and many.max() <= 3 / 4
    sizes = np.diff([*np.linspace(0, 1000, COLUMNS + 1).astype(int)])
    assert (many[0] * sizes).sum() == pytest.approx(500)


def test_the_picture_has_the_colours_of_what_is_kept() -> None:
    from PIL import Image

    ((what, said, svg),) = pictures({"units": {"heads": 4}, "kept_heads": [[0, 1, 2, 3], [1], []]})
    assert what == "heads" and said == "5 of 12 are left"
    png = re.search(r'href="data:image/png;base64,([^"]+)"', svg)
    assert png
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode("".join(png[1].split())))))[..., 3]
    cells = np.asarray(Image.fromarray(alpha).resize((4, 3), Image.Resampling.NEAREST))
    assert {tuple(row) for row in (cells > 127).tolist()} == {
        (True,) * 4,
        (False, True, False, False),
        (False,) * 4,
    }


def test_kinds_of_units() -> None:
    blocks = pictures({"removal_order": [2, 0], "losses": [[1.0, None, 2.0, 3.0]]})
    assert [(what, said) for what, said, _ in blocks] == [("blocks", "2 of 4 are left")]
    assert pictures({"removal_order": [2], "losses": [[1.0]], "removed_parts": [[0, "o"]]}) == [], (
        "halves have a plot of their own"
    )
    assert pictures({}) == []
    page = report.render(
        {
            "model": "m",
            "method": "sleb",
            "sparsity": {"per_linear": {}},
            "details": {"units": {"heads": 2}, "kept_heads": [[1]]},
        }
    )
    assert "Kept heads" in page and "1 of 2 are left" in page
