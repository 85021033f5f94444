"""Method calls are literals checked against a signature, and nothing is ever evaluated."""

import ast
from collections.abc import Sequence
from typing import Literal

import pytest

from launch.flags.calls import build, parse_call, parse_method_spec, split_list
from models.errors import InputError


def maker(
    kind: Literal["a", "b"] = "a", share: float = 0.5, on: bool = True, count: int | None = None
) -> tuple:
    return kind, share, on, count


def with_list(items: Sequence[int] | None = None) -> object:
    return items


def with_required(name: str) -> str:
    return name


KNOWN = {"maker": maker, "with_list": with_list, "with_required": with_required}


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("wanda", ("wanda", {})),
        ("wanda()", ("wanda", {})),
        ('f(a="x", b=-1.5, c=None)', ("f", {"a": "x", "b": -1.5, "c": None})),
    ],
)
def test_a_call_is_a_name_with_literal_arguments(text: str, parsed: tuple) -> None:
    assert parse_call(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "a.b",
        "f(1)",
        "f(*x)",
        "f(**x)",
        "f(a=g())",
        "f(a=b)",
        "__import__('os').system('true')",
        "f(",
        "f(a=1)(b=2)",
        "(" * 500,
        "f(a={[]: 1})",
        "f(a=" + "1" * 5000 + ")",
        "f(a=" + "-" * 5000 + "1)",
        "f(a=1if 2else 3)",
        "f(a='\\d', a=1)",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_call(text)


def test_build_calls_with_the_arguments() -> None:
    assert build("method", "maker", KNOWN) == ("a", 0.5, True, None)
    assert build("method", 'maker(kind="b", share=1, on=False, count=4)', KNOWN) == (
        "b",
        1,
        False,
        4,
    )


@pytest.mark.parametrize("text", ["[4, 5, 12]", "(4, 5, 12)", "[]", "None"])
def test_a_list_of_integers_is_a_literal(text: str) -> None:
    assert build("method", f"with_list(items={text})", KNOWN) == ast.literal_eval(text)


@pytest.mark.parametrize("text", ["[4.0]", "[True]", "4", "'45'", "[[4]]", "{4: 5}"])
def test_other_lists_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="give a list of integers or None"):
        build("method", f"with_list(items={text})", KNOWN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zebra", "maker, with_list, with_required"),
        ("maker(zebra=1)", "kind, share, on, count"),
        ('maker(kind="c")', "'a', 'b'"),
        ("maker(share=True)", "a number"),
        ('maker(share="x")', "a number"),
        ("maker(on=1)", "True or False"),
        ("maker(count=1.5)", "an integer or None"),
        ("maker(share=1e999)", "a share without bounds"),
        ("maker(share=-1e300)", "a share without bounds"),
        ("maker(count=10000000000)", "a count without bounds"),
        ("maker(kind=[1])", "'a', 'b'"),
        ("maker(kind={'a': 1})", "'a', 'b'"),
        ("with_required", "needs name"),
    ],
)
def test_an_error_lists_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("method", text, KNOWN)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("wanda", ("wanda", None, ())),
        ("flap@0.2", ("flap", 0.2, ())),
        ("wanda@0.5 + owl(m=7) + dsnot", ("wanda", 0.5, ("owl(m=7)", "dsnot"))),
    ],
)
def test_a_method_brings_its_sparsity_and_modifiers(text: str, spec: tuple) -> None:
    assert parse_method_spec(text) == spec


def test_a_sparsity_beyond_floats_is_refused() -> None:
    with pytest.raises(InputError):
        parse_method_spec("wanda@" + "1" * 400)


def test_commas_in_parentheses_do_not_split_a_list() -> None:
    assert split_list("wanda, owl(m=7, lam=0.1)") == ["wanda", "owl(m=7, lam=0.1)"]
