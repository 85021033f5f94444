"""Take over pages of the repository's root, and make their links into docs/ links of the site."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {"build-notes.md": "BUILD_NOTES.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page's Markdown, read from the root for the pages in PAGES (mkdocs hook)."""
    source = PAGES.get(page.file.src_path)
    if source is None:
        return markdown
    return re.sub(r"\]\(docs/", "](", (ROOT / source).read_text(encoding="utf-8"))
