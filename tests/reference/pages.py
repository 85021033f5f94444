"""Code blocks of the documentation's pages."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def code(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language in a page; fail if it has none."""
    found = re.findall(
        rf"^```{language}\n(.*?)^```$",
        (ROOT / page).read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert found, f"{page} has no {language}"
    return found
