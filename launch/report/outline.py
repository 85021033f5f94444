"""Write JSON that people read: mappings over lines, plain lists on one."""

import json
from collections.abc import Mapping
from typing import Any


def outline(value: Any, most: int | None = None, indent: str = "") -> str:
    """Return indented JSON with every plain list on one line.

    Args:
      value: JSON-able value.
      most: Most members of a plain list to show, followed by their number; None for all of them,
        which alone is JSON.
      indent: Space before the lines behind the first.
    """
    inner = indent + "  "
    if isinstance(value, Mapping) and value:
        lines = []
        for key, member in value.items():
            name = json.dumps(str(key), ensure_ascii=False)
            lines.append(f"{inner}{name}: {outline(member, most, inner)}")
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list | tuple):
        if any(isinstance(v, Mapping | list | tuple) for v in value):
            members = ",\n".join(inner + outline(v, most, inner) for v in value)
            return f"[\n{members}\n{indent}]"
        if most is not None and len(value) > most:
            shown = json.dumps(value[:most], ensure_ascii=False)
            return f"{shown[:-1]}, … {len(value):,} in total]"
        if most is None:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return json.dumps(value, ensure_ascii=False)
