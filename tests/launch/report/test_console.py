"""Tables and notes: plain text in logs, styled on terminals, whole at every width."""

import io
from typing import Any

import pytest
from rich.console import Console

from launch.report import console as shown
from reference.consoles import is_plain, log, terminal, text_of

REPORT: dict[str, Any] = {
    "model": "embedded:tiny-llama [bold]x",
    "method": "wanda",
    "settings": {"output": "/out/[red]pruned" + "x" * 120},
    "sparsity": {"target": 0.5, "prunable": 0.4998, "total": 0.4},
    "parameters": {"dense": 1_234_567, "pruned": 1_000_001},
    "bytes": {"dense": 2**20, "pruned": 2**19},
    "perplexity": {
        "wikitext2": {"dense": 8.1, "pruned": float("inf")},
        "a/[i]b.npy": {"dense": 2.0, "pruned": 3.0},
    },
    "seconds": {"load": 1.0, "calibrate_and_prune": 2.0},
    "peak_memory_bytes": {"host": 1024, "device": None},
    "warnings": ["damping was [raised] to 0.1"],
}


def test_the_closing_table_holds_the_numbers() -> None:
    console = log()
    console.print(shown.closing_table(REPORT))
    text = text_of(console)
    for part in (
        "8.100",
        "inf",
        "1.500x",
        "49.98%",
        "target 50%",
        "1,234,567",
        "1,000,001",
        "-19.00%",
        "512.0 KiB",
        "3.00 s",
    ):
        assert part in text, part


def test_a_log_is_plain_text_and_brackets_are_not_markup() -> None:
    console = log()
    shown.show(REPORT, console)
    text = text_of(console)
    assert is_plain(text)
    for part in (
        "tiny-llama [bold]x",
        "[i]b.npy",
        "warning: damping was [raised] to 0.1\n",
        REPORT["settings"]["output"] + "\n",
    ):
        assert part in text, part


def test_a_terminal_is_styled() -> None:
    console = terminal()
    shown.show(REPORT, console)
    assert "\x1b[" in text_of(console)


def test_warnings_and_output_may_be_missing() -> None:
    console = log()
    shown.show(REPORT | {"warnings": [], "settings": {}}, console)
    assert "warning" not in text_of(console) and "pruned model" not in text_of(console)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_wide_table_is_cut_to_fit_and_loses_nothing(width: int, labels: int) -> None:
    heads = ["run", "how", *(f"a long heading, n{k}" for k in range(9))]
    body = [[f"run{i}", f"[b]{i}", *(f"{i}{k}% ± 3.45%" for k in range(9))] for i in range(3)]
    console = Console(file=io.StringIO(), width=width)
    shown.show_wide("[title]", [heads, *body], console, labels=labels)
    lines = text_of(console).splitlines()
    assert lines[0].strip() == "[title]" and max(map(len, lines)) <= width
    parts = sum(line.startswith("┏") for line in lines)
    assert (parts == 1) == (width == 200)
    for i, row in enumerate(body):
        own = [line for line in lines if f"run{i}" in line]
        assert (
            len(own) == parts
            and [cell for cell in row[2:] if sum(cell in line for line in own) != 1] == []
        )
        assert all(f"[b]{i}" in line for line in own) == (labels == 2 or parts == 1)


def test_a_wide_table_folds_a_name_that_is_longer_than_the_line() -> None:
    console = Console(file=io.StringIO(), width=40)
    shown.show_wide("", [["run", "figure"], ["m" * 100, "1.5"]], console)
    text = text_of(console)
    assert text.count("m") == 100 and "1.5" in text and max(map(len, text.splitlines())) <= 40
