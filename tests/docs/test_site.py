"""The documentation's site is complete, builds strictly, and fetches nothing from elsewhere."""

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
# Names that differ from their page's.
PAGES = {"wanda_sp": "wanda-sp", "magnitude_sp": "wanda-sp", "two_ssp": "two-ssp"}
PARTS = ("Equations", "Flags", "Measured", "Differences from the authors' code")


def pages(nav: object) -> Iterator[str]:
    """Yield the pages of an mkdocs navigation, at any depth."""
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
def test_the_page_of_a_method_has_every_part(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert not [p for p in PARTS if f"\n## {p}\n" not in text]
    assert "\nPaper: " in text and "\nFiles: " in text
    assert "python -m launch." in text.split("\n## Measured\n")[1].split("\n## ")[0]


def test_every_decision_is_in_the_build_notes() -> None:
    notes = (ROOT / "BUILD_NOTES.md").read_text(encoding="utf-8")
    assert not [p.name for p in DOCS.glob("decisions/*.md") if f"decisions/{p.name})" not in notes]
    assert len(notes.splitlines()) <= 120


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("decisions/*.md")))
def test_a_decision_has_every_part(page: str) -> None:
    text = (DOCS / "decisions" / page).read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.M) == ["Context", "Decision", "Evidence", "Rejected"]
    assert len(re.findall(r"^\|-", text, re.M)) == 1, "one table of evidence"


def test_the_links_of_the_repositorys_pages_lead_somewhere() -> None:
    for page in (
        "README.md",
        "BUILD_NOTES.md",
        "CHANGELOG.md",
        "notebooks/README.md",
        "launch/tpu_pod.md",
    ):
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
        assert not [t for t in targets if not ((ROOT / page).parent / t).exists()], page


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


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


class FetchedAddresses(HTMLParser):
    """Addresses that a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("rel") != "canonical" and tag != "a":
            self.addresses += [given[name] or "" for name in ("src", "href") if name in given]


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
        parser = FetchedAddresses()
        parser.feed(html)
        assert parser.addresses and not [
            a for a in parser.addresses if re.match(r"(https?:)?//", a)
        ], name
        assert "arithmatex" not in html
        assert (
            html.count('display="block"')
            == (DOCS / name).read_text(encoding="utf-8").count("$$") // 2
        ), name
    styles = "".join(f.read_text(encoding="utf-8") for f in tmp_path.rglob("*.css"))
    assert not re.findall(r"@import|url\([\"']?(?:https?:)?//", styles)
