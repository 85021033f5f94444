"""Method calls are literals checked against a signature, and nothing is ever evaluated."""

from typing import Literal

import pytest

from launch.flags.calls import build, parse_call
from models.errors import InputError


def maker(
    kind: Literal["a", "b"] = "a", share: float = 0.5, on: bool = True, count: int | None = None
) -> tuple:
    return kind, share, on, count


def needy(name: str) -> str:
    return name


KNOWN = {"maker": maker, "needy": needy}


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("wanda", ("wanda", {})),
        ("wanda()", ("wanda", {})),
        ('f(a="x", b=-1.5, c=None)', ("f", {"a": "x", "b": -1.5, "c": None})),
    ],
)
def test_parse(text: str, parsed: tuple) -> None:
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zebra", "maker, needy"),
        ("maker(zebra=1)", "kind, share, on, count"),
        ('maker(kind="c")', "'a', 'b'"),
        ("maker(share=True)", "a number"),
        ('maker(share="x")', "a number"),
        ("maker(on=1)", "True or False"),
        ("maker(count=1.5)", "an integer or None"),
        ("needy", "needs name"),
    ],
)
def test_errors_say_what_there_is(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build("method", text, KNOWN)
