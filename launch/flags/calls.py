"""Methods as a user writes them, `wanda` or `llmrank(scorer="mpr", chain=False)`: parsed as literals, checked against the signature."""

import ast
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, NamedTuple

from models.errors import InputError


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """The name and keyword arguments of a call whose arguments are literals; nothing is evaluated. InputError if it is not one."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and not node.args
            and all(k.arg for k in node.keywords)
        ):
            return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise InputError(
        f'{text!r} is not a name or a call with literal keyword arguments such as wanda or llmrank(scorer="mpr")'
    )


class Asked(NamedTuple):
    """A method as a sweep's list has it: the call, the fraction it says itself, and the calls that go with it."""

    call: str
    sparsity: float | None
    beside: tuple[str, ...]


def parse_asked(text: str) -> Asked:
    """Read `wanda`, `flap@0.2`, `wanda@0.5 + owl(m=7)`; InputError for anything else."""
    try:
        node: ast.expr = ast.parse(text.strip(), mode="eval").body
        beside, sparsity = [], None
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            beside.append(str(ast.get_source_segment(text.strip(), node.right)))
            node = node.left
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            sparsity, node = float(ast.literal_eval(node.right)), node.left
        return Asked(
            str(ast.get_source_segment(text.strip(), node)), sparsity, tuple(reversed(beside))
        )
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise InputError(
            f"{text!r} is not a name or a call such as wanda, flap@0.2 or wanda@0.5+owl(m=7)"
        ) from None


def each(text: str) -> list[str]:
    """The items of a comma-separated list; commas inside parentheses do not separate."""
    return [item.strip() for item in re.split(r",(?![^(]*\))", text)]


def build(flag: str, text: str, known: Mapping[str, Callable[..., Any]]) -> Any:
    """Call what `text` names out of `known` with its arguments.

    Raises InputError for an unknown name, an unknown or missing parameter, or a value of the wrong type, saying what there is.
    """
    name, arguments = parse_call(text)
    if name not in known:
        raise InputError(
            f"--{flag}={text}: there is no {flag} {name!r}: there are {', '.join(sorted(known))}"
        )
    maker = known[name]
    hints = typing.get_type_hints(maker)
    parameters = inspect.signature(maker).parameters
    for key, value in arguments.items():
        if key not in parameters:
            raise InputError(
                f"--{flag}={text}: {name} has no parameter {key!r}: it has {', '.join(parameters) or 'none'}"
            )
        if not fits(value, hints[key]):
            raise InputError(f"--{flag}={text}: {key}={value!r} must be {described(hints[key])}")
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise InputError(f"--{flag}={text}: {name} needs {', '.join(missing)}")
    return maker(**arguments)


def _options(hint: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else (hint,)
    )


def fits(value: Any, hint: Any) -> bool:
    """Whether a literal is of an annotated type: a Literal, int, float (an int will do), bool, str, None, or a union of these."""
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            if any(value == v and type(value) is type(v) for v in typing.get_args(option)):
                return True
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif type(value) is option:
            return True
    return False


def described(hint: Any) -> str:
    """An annotation in a user's words."""
    words = {
        float: "a number",
        int: "an integer",
        bool: "True or False",
        str: "a text",
        type(None): "None",
    }
    parts = []
    for option in _options(hint):
        parts.append(
            "one of " + ", ".join(map(repr, typing.get_args(option)))
            if typing.get_origin(option) is Literal
            else words[option]
        )
    return " or ".join(parts)
