"""The value of --calibration is parsed with the settings of `self`, and errors name the flag."""

import pytest

from calibration.generated import self_text
from launch.flags.sources import parse_calibration, self_settings
from launch.plan import options as plan_options
from launch.run.job import CalibrationSource
from models.errors import InputError


def test_settings_of_self_are_those_of_its_call() -> None:
    assert self_settings("self") == self_settings("self()") == self_text()
    text = 'self(temperature=2,top_p=0.9,prompts="a,b:1.txt",prompt_tokens=4)'
    assert self_settings(text) == self_text(2, 0.9, "a,b:1.txt", 4)
    assert [part.source for part in parse_calibration(f"{text}:1,c4:2")] == [text, "c4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("self(temperatur=1)", "has no parameter 'temperatur': did you mean temperature?"),
        ("c4:1,self(top_p='x'):1", "has a wrong top_p: give a number"),
        ("self(prompts=3)", "has a wrong prompts: give a text"),
        ("self(0.5)", "is not a name or a call with literal keyword arguments"),
        ("self(temperature=1e999)", "has a temperature without bounds"),
        ("self(top_p=0)", "has top_p=0: give a number above 0"),
        ("c4:1,self", "has no share in 'self'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_calibration(text)
    assert message in str(error.value)


def test_a_source_says_whether_the_model_writes() -> None:
    for name, expected in (("c4", False), ("c4:1,self():1", True), ("self.txt", False)):
        assert CalibrationSource(name, 1, 1, (0,), "").generated is expected


def test_a_shell_completes_names_within_a_mix() -> None:
    values = plan_options().completions["calibration"]
    assert {"self", "c4", "wikitext2"} <= set(values.names)
    assert values.several and values.files
