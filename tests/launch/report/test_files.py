"""The report's JSON stays small, and both files together hold all of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.report import files
from launch.report.files import DETAILS, LIMIT, read_report, write_reports


def report(neurons: int) -> dict[str, Any]:
    kept = [list(range(neurons)) for _ in range(32)]
    return {
        "model": "m",
        "method": "flap",
        "settings": {},
        "sparsity": {
            "target": 0.2,
            "prunable": 0.2,
            "per_linear": {f"model.layers.{i}.mlp.up_proj": 0.25 for i in range(32)},
            "asked": {f"model.layers.{i}.mlp.up_proj": 0.2 for i in range(32)},
        },
        "perplexity": {"c4": {"dense": 2.5, "pruned": 3.25, "tokens": 7}},
        "figures": [],
        "scores": {"label": "s", "per_linear": {}},
        "details": {"kept_heads": [[0, 2]] * 32, "kept_neurons": kept, "note": "[a,\n b]"},
    }


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.html, "write_html", lambda *_: None)


@pytest.mark.parametrize("neurons", [64, 1200, 8000])
def test_a_report_is_small_and_is_read_back_whole(neurons: int, tmp_path: Path) -> None:
    written = report(neurons)
    write_reports(tmp_path, written)
    assert (tmp_path / files.REPORT).stat().st_size < LIMIT
    assert read_report(tmp_path) == json.loads(json.dumps(written))


def test_what_users_rely_on_stays_in_the_first_file_while_there_is_room(tmp_path: Path) -> None:
    written = report(1000)
    write_reports(tmp_path, written)
    first = json.loads((tmp_path / files.REPORT).read_text())
    assert first["details"] == written["details"] and first["sparsity"] == written["sparsity"]
    assert first["details_file"] == {"name": DETAILS, "holds": ["figures", "scores"]}


def test_lists_that_are_not_promised_move_first(tmp_path: Path) -> None:
    written = report(1200)
    written["details"]["removed"] = {"model.layers.0.mlp.up_proj": list(range(9000))}
    write_reports(tmp_path, written)
    first = json.loads((tmp_path / files.REPORT).read_text())
    assert first["details_file"]["holds"] == ["figures", "scores", "details.removed"]
    write_reports(tmp_path, written | {"method": 'llmrank(scorer="mpr")'})
    first = json.loads((tmp_path / files.REPORT).read_text())
    assert first["details_file"]["holds"] == ["figures", "scores", "details.kept_neurons"]
    assert "removed" in first["details"]


def test_only_the_largest_part_moves_where_there_is_no_room(tmp_path: Path) -> None:
    write_reports(tmp_path, report(8000))
    first = json.loads((tmp_path / files.REPORT).read_text())
    assert first["details_file"]["holds"] == ["figures", "scores", "details.kept_neurons"]
    assert first["details"].keys() == {"kept_heads", "note"}
    details = json.loads((tmp_path / DETAILS).read_text())
    assert len(details["details"]["kept_neurons"]) == 32


def test_writing_leaves_the_report_alone_and_reads_reports_of_one_file(tmp_path: Path) -> None:
    written = report(8000)
    write_reports(tmp_path, written)
    assert written == report(8000)
    (tmp_path / files.REPORT).write_text(json.dumps({"method": "wanda"}))
    assert read_report(tmp_path) == {"method": "wanda"}
