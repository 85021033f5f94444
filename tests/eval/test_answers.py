"""Cached answers are read; other weights, other requests and damaged files are computed."""

import pathlib

import pytest

from eval.answers import AnswerCache, cache_directory

REQUESTS = [["a", "b"], ["c", "d"], ["e", "f"]]
GROUPS = ["x", "y", "x"]


class Model:
    """Answers with what it was asked, and remembers what."""

    def __init__(self, directory: pathlib.Path | None, name: str = "m"):
        self.answers, self.asked = AnswerCache(directory, {"weights": name}), list[int]()

    def __call__(
        self, requests: list[list[str]] = REQUESTS, kind: str = "loglikelihood"
    ) -> list[list[object]]:
        def compute(own: list[int]) -> list[list[object]]:
            self.asked += own
            return [[" ".join(requests[i]), True] for i in own]

        return self.answers.get(kind, requests, GROUPS, compute)


def test_cached_answers_are_not_computed_again(tmp_path: pathlib.Path) -> None:
    model = Model(tmp_path / "cache")
    expected = [["a b", True], ["c d", True], ["e f", True]]
    assert model() == expected and model.asked == [0, 2, 1]
    assert model() == expected and Model(tmp_path / "cache")() == expected
    assert model.asked == [0, 2, 1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_model_kind_or_request_is_computed(tmp_path: pathlib.Path) -> None:
    Model(tmp_path)()
    other = Model(tmp_path, "other")
    other()
    assert other.asked == [0, 2, 1]
    same = Model(tmp_path)
    same(kind="generate_until")
    assert same.asked == [0, 2, 1]
    same.asked = []
    assert same([["a", "b"], ["c", "D"], ["e", "f"]])[1] == ["c D", True]
    assert same.asked == [1], "the group that is known is read"


def test_a_flipped_bit_is_computed_again(tmp_path: pathlib.Path) -> None:
    Model(tmp_path)()
    for file in tmp_path.iterdir():
        assert "true" in file.read_text()
        file.write_text(file.read_text().replace("a b", "a c").replace("e f", "e g"))
    model = Model(tmp_path)
    assert model() == [["a b", True], ["c d", True], ["e f", True]]


@pytest.mark.parametrize("damage", ["", "[", "{}", '[["a b", true], 1, 2]'])
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: pathlib.Path) -> None:
    Model(tmp_path)()
    for file in tmp_path.iterdir():
        file.write_text(damage)
    model = Model(tmp_path)
    assert model() == [["a b", True], ["c d", True], ["e f", True]]
    assert 0 in model.asked and 2 in model.asked


def test_answers_are_right_without_a_writable_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (None, tmp_path / "file" / "cache"):
        model = Model(directory)
        model()
        assert model() == [["a b", True], ["c d", True], ["e f", True]]
        assert model.asked == [0, 2, 1] * 2


def test_the_cache_lies_in_the_users_cache_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "topiary" / "tasks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "topiary" / "tasks"
