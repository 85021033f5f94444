"""The documentation's site: complete, strict, and fetching nothing from elsewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from reference.pages import ROOT

DOCS = ROOT / "docs"
PAGES = {"wanda_sp": "wanda-sp", "magnitude_sp": "wanda-sp"}  # of names that are not their page's
PARTS = ("Equations", "Flags", "Measured", "Differences from the authors' code")


def pages(nav: object) -> Iterator[str]:
    """The pages of a navigation of mkdocs, at whatever depth."""
    if isinstance(nav, str):
        yield nav
    elif nav:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(item)


def navigation() -> list[str]:
    return list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def page_of(name: str) -> str:
    return f"methods/{PAGES.get(name, name)}.md"


def named() -> list[str]:
    return [name for name in (*METHODS, *ALLOCATIONS, *REFINEMENTS) if name != "none"]


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(navigation()) == sorted(
        p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")
    )


@pytest.mark.parametrize("name", named())
def test_every_method_has_a_page_in_the_navigation(name: str) -> None:
    assert page_of(name) in navigation()
    assert re.search(
        rf"--(method|allocation|refine)='?{name}\b",
        (DOCS / page_of(name)).read_text(encoding="utf-8"),
    )


@pytest.mark.parametrize("page", sorted({page_of(name) for name in named()}))
def test_a_methods_page_has_every_part(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert not [p for p in PARTS if f"\n## {p}\n" not in text]
    assert "\nPaper: " in text and "\nFiles: " in text
    assert "python -m launch." in text.split("\n## Measured\n")[1].split("\n## ")[0]


def test_the_files_that_pages_name_exist() -> None:
    named = {
        f
        for page in DOCS.rglob("*.md")
        for f in re.findall(r"`((?:[a-z_]+/)+[\w-]+\.\w+)`", page.read_text("utf-8"))
    }
    folders = ("models", "calibration", "pruning", "eval", "launch", "configs", "docs", "tests")
    assert len(named) > 20 and not [
        f for f in named if f.split("/")[0] in folders and not (ROOT / f).is_file()
    ]


class Fetched(HTMLParser):
    """The addresses that a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("rel") != "canonical" and tag != "a":
            self.found += [given[name] or "" for name in ("src", "href") if name in given]


def test_the_site_builds_strictly_and_fetches_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path),
    ]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    for name in navigation():
        html = (tmp_path / name).with_suffix(".html").read_text(encoding="utf-8")
        parser = Fetched()
        parser.feed(html)
        assert parser.found and not [a for a in parser.found if re.match(r"(https?:)?//", a)], name
        assert "arithmatex" not in html
        assert (
            html.count('display="block"')
            == (DOCS / name).read_text(encoding="utf-8").count("$$") // 2
        ), name
    styles = "".join(f.read_text(encoding="utf-8") for f in tmp_path.rglob("*.css"))
    assert not re.findall(r"@import|url\([\"']?(?:https?:)?//", styles)
