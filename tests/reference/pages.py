"""The code blocks of a page of the documentation."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def code(page: str, language: str) -> list[str]:
    """The fenced blocks of a language in a page, named from the repository's root; there is at least one."""
    found = re.findall(
        rf"^```{language}\n(.*?)^```$",
        (ROOT / page).read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert found, f"{page} has no {language}"
    return found
