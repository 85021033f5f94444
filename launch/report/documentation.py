"""Name the pages of the documentation that explain a run's method."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS

SHARED = {"magnitude_sp": "wanda-sp"}  # methods whose page has another's name
OF_NOTHING = ("uniform", "none")  # what every run does that asks for nothing else


class Page(NamedTuple):
    """A page of the documentation.

    Attributes:
      name: Name of the method, allocation or refinement that it explains.
      path: Path of the page in the repository.
    """

    name: str
    path: str


def pages(report: Mapping[str, Any]) -> list[Page]:
    """Return the page of the method, of the allocation and of the refinement, where they have one.

    The report names them and does not link to them: it is read on machines that have no clone.

    Args:
      report: Content of pruning_report.json.
    """
    settings = report.get("settings", {})
    calls = [report["method"], settings.get("allocation"), settings.get("refine")]
    names = [str(call or "").partition("(")[0] for call in calls]
    known = {*METHODS, *ALLOCATIONS, *REFINEMENTS}.difference(OF_NOTHING)
    return [
        Page(name, f"docs/methods/{SHARED.get(name, name.replace('_', '-'))}.md")
        for name in names
        if name in known
    ]
