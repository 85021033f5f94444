"""Parse methods as users write them, such as `wanda` or `llmrank(scorer="mpr", chain=False)`.

Arguments are literals, checked against the signature of what is called. Nothing is evaluated.
"""

import ast
import inspect
import re
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, NamedTuple

from launch.flags.suggest import one_of
from models.errors import InputError
from models.untrusted import LARGEST, MOST, is_count

# Python's parser raises these for text that is no expression, or is nested too deeply.
_PARSE_ERRORS = (
    SyntaxError,
    ValueError,
    TypeError,
    OverflowError,
    RecursionError,
    MemoryError,
)
_TYPE_NAMES = {
    float: "a number",
    int: "an integer",
    bool: "True or False",
    str: "a text",
    type(None): "None",
    Sequence[int]: "a list of integers",
}


def _parse(text: str) -> ast.expr:
    """Parse an expression without a word about what may be odd in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text, mode="eval").body


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Parse a call whose arguments are keyword literals.

    Args:
      text: A name, or a call such as `llmrank(scorer="mpr")`.

    Returns:
      The name and the arguments by keyword.

    Raises:
      InputError: The text is neither.
    """
    try:
        node = _parse(text.strip())
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            # A keyword without a name is a `**mapping`.
            named = {k.arg: k.value for k in node.keywords if k.arg}
            if len(named) == len(node.keywords):
                return node.func.id, {key: ast.literal_eval(v) for key, v in named.items()}
    except _PARSE_ERRORS:
        pass
    raise InputError(
        f"{text!r} is not a name or a call with literal keyword arguments, such as wanda or "
        'llmrank(scorer="mpr")'
    )


class MethodSpec(NamedTuple):
    """A method of a sweep's list, with the settings that it brings along.

    Attributes:
      call: The method's call.
      sparsity: Fraction to remove; None if the list gives none.
      modifiers: Calls of allocations and refinements to use with the method.
    """

    call: str
    sparsity: float | None
    modifiers: tuple[str, ...]


def parse_method_spec(text: str) -> MethodSpec:
    """Parse an item of a sweep's list of methods.

    Args:
      text: For example `wanda`, `flap@0.2` or `wanda@0.5 + owl(m=7)`.

    Raises:
      InputError: The text is of no such form.
    """
    text = text.strip()
    try:
        node = _parse(text)
        modifiers, sparsity = [], None
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            modifiers.append(str(ast.get_source_segment(text, node.right)))
            node = node.left
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            sparsity = float(ast.literal_eval(node.right))
            node = node.left
        call = str(ast.get_source_segment(text, node))
    except _PARSE_ERRORS:
        raise InputError(
            f"{text!r} is not a name or a call such as wanda, flap@0.2 or wanda@0.5+owl(m=7)"
        ) from None
    # The loop meets the last modifier first.
    return MethodSpec(call, sparsity, tuple(reversed(modifiers)))


def split_sum(field: str, text: str) -> list[str]:
    """Split calls that are joined with `+`.

    Args:
      field: Name of the setting, for errors.
      text: For example `blocks(steps=32)+distill`.

    Raises:
      InputError: The text is of no such form.
    """
    text = text.strip()
    parts: list[str] = []
    try:
        node = _parse(text)
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts.append(str(ast.get_source_segment(text, node.right)))
            node = node.left
        parts.append(str(ast.get_source_segment(text, node)))
    except _PARSE_ERRORS:
        raise InputError(
            "is not a name or a call, or several joined with +", field=field, value=text
        ) from None
    # The loop meets the last one first.
    return parts[::-1]


def split_list(text: str) -> list[str]:
    """Split a comma-separated list; commas inside parentheses do not separate.

    Args:
      text: The list.
    """
    return [item.strip() for item in re.split(r",(?![^(]*\))", text)]


def build(field: str, text: str, makers: Mapping[str, Callable[..., Any]]) -> Any:
    """Call the function that a text names, with the text's arguments.

    Args:
      field: Name of the setting, for errors.
      text: A name or a call.
      makers: Functions by name.

    Returns:
      The function's result.

    Raises:
      InputError: The name or a parameter is unknown, a parameter is missing, or a value has the
        wrong type.
    """
    name, arguments = parse_call(text)
    if name not in makers:
        raise InputError("is unknown", one_of(name, sorted(makers)), field=field, value=text)
    maker = makers[name]
    hints = typing.get_type_hints(maker)
    parameters = inspect.signature(maker).parameters
    for key, value in arguments.items():
        if key not in parameters:
            has = one_of(key, parameters) if parameters else "it has none"
            raise InputError(f"has no parameter {key!r}", has, field=field, value=text)
        if not _is_bounded(value):
            raise InputError(
                f"has a {key} without bounds", "give a smaller number", field=field, value=text
            )
        if not matches_type(value, hints[key]):
            raise InputError(
                f"has a wrong {key}", f"give {describe_type(hints[key])}", field=field, value=text
            )
    required = [key for key, p in parameters.items() if p.default is p.empty]
    missing = [key for key in required if key not in arguments]
    if missing:
        raise InputError(
            "is incomplete", f"{name} needs {', '.join(missing)}", field=field, value=text
        )
    return maker(**arguments)


def _is_bounded(value: Any) -> bool:
    """Return False for a number that is infinite in float32, or an integer beyond 32 bits."""
    if type(value) is int:
        return is_count(value, -MOST)
    return not isinstance(value, float) or abs(value) < LARGEST


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    is_union = typing.get_origin(hint) in (UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def matches_type(value: Any, hint: Any) -> bool:
    """Return True if a literal has an annotated type.

    Args:
      value: The literal.
      hint: A Literal, int, float, bool, str, None, Sequence[int] or a union of these. An int is
        also a float.
    """
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            # Python holds 1 equal to True.
            if any(value == v and type(value) is type(v) for v in typing.get_args(option)):
                return True
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif option == Sequence[int]:
            if isinstance(value, list | tuple) and all(type(v) is int for v in value):
                return True
        elif type(value) is option:
            return True
    return False


def describe_type(hint: Any) -> str:
    """Describe an annotation in a user's words.

    Args:
      hint: As for `matches_type`.
    """
    parts = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            parts.append("one of " + ", ".join(map(repr, typing.get_args(option))))
        else:
            parts.append(_TYPE_NAMES[option])
    return " or ".join(parts)
