"""Equations as MathML, made while the site is built: browsers draw it themselves, without a script or a font from elsewhere."""

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
log = logging.getLogger("mkdocs.equations")  # a warning of mkdocs ends a strict build


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """mkdocs' hook: the page's HTML with the LaTeX that arithmatex marked replaced; a command that is not known is a warning."""

    def mathml(found: re.Match[str]) -> str:
        made = convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")
        if "\\" in made:
            log.warning(
                "%s: an equation has a command that MathML cannot be made of: %s",
                page.file.src_path,
                found[2].strip(),
            )
        return made

    return EQUATION.sub(mathml, content)
