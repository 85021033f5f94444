"""Find the pages of the documentation that explain a run's method."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# The pages of a clone. A package without them has none to link to.
METHODS = pathlib.Path(__file__).parents[2] / "docs" / "methods"
SHARED = {"magnitude_sp": "wanda-sp"}  # methods whose page has another's name


class Link(NamedTuple):
    """A page of the documentation.

    Attributes:
      name: Name of the method, allocation or refinement that it explains.
      page: Name of the page below docs/methods.
      address: The page as a URI.
    """

    name: str
    page: str
    address: str


def pages(report: Mapping[str, Any]) -> list[Link]:
    """Return the page of the method, of the allocation and of the refinement, where they have one.

    Args:
      report: Content of pruning_report.json.
    """
    settings = report.get("settings", {})
    calls = [report["method"], settings.get("allocation"), settings.get("refine")]
    links = []
    for call in calls:
        name = re.match(r"\w*", str(call or ""))[0]  # type: ignore[index]
        page = METHODS / f"{SHARED.get(name, name.replace('_', '-'))}.md"
        if name not in ("", "index", "uniform") and page.is_file():
            links.append(Link(name, page.name, page.as_uri()))
    return links
