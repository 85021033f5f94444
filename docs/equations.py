"""Turn equations into MathML while the site is built.

Browsers draw MathML themselves, without a script or a font from elsewhere.
"""

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
log = logging.getLogger("mkdocs.equations")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Return the page's HTML with its LaTeX as MathML (mkdocs hook).

    An unknown LaTeX command is a warning, which ends a strict build.

    Args:
      content: HTML with the LaTeX that arithmatex marked.
      page: The page, named in the warning.
    """

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        converted = convert(html.unescape(match[2]), display=display)
        if "\\" in converted:
            log.warning("%s: unknown LaTeX command in %s", page.file.src_path, match[2].strip())
        return converted

    return EQUATION.sub(mathml, content)
