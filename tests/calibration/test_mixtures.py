"""Mixes of sources: counts, order and bytes against NumPy, and what is refused."""

import hashlib
import json
import pathlib
import random
from fractions import Fraction

import numpy as np
import pytest

from calibration.data import Tokens
from calibration.mixtures import (
    Part,
    check_parts,
    interleaved,
    is_generated,
    mixed_windows,
    parse_parts,
    window_counts,
)
from models.errors import InputError
from reference.loaders import texts
from reference.windows import calibrate


def mix(text: str, samples: int = 10, length: int = 32, seed: int = 0) -> Tokens:
    """Read a mix with the byte tokenizer."""
    return mixed_windows(
        parse_parts(text),
        lambda source, count: calibrate(source, samples=count, length=length, seed=seed),
        samples=samples,
        length=length,
        seed=seed,
    )


@pytest.fixture
def files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Return the working directory, with files of every kind."""
    (tmp_path / "a.txt").write_text("".join(texts(50, 50)))
    rows = (json.dumps({"text": text}) + "\n" for text in texts(50, 80, seed=3))
    (tmp_path / "b.jsonl").write_text("".join(rows))
    (tmp_path / "x:1,y.txt").write_text("".join(texts(50, 50, seed=5)))
    (tmp_path / "c4:0.5,d.txt").write_text("".join(texts(50, 50, seed=6)))
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, 99, (20, 32)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(text: str) -> list[tuple[str, float]]:
    return [(part.source, float(part.share)) for part in parse_parts(text)]


# --- What a text means.


@pytest.mark.parametrize("text", ["c4", "self", "self(temperature=1)", "a.txt", "x:1,y.txt"])
def test_one_source_is_one_part(files: pathlib.Path, text: str) -> None:
    assert parsed(text) == [(text, 1.0)]


@pytest.mark.parametrize("text", ["", "none.txt", "C:\\text.txt", "~nobody_here/x", "x" * 5000])
def test_what_is_no_mix_is_left_to_the_reader_of_files(text: str) -> None:
    assert parsed(text) == [(text, 1.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c4:0.5,wikitext2:0.3,a.txt:0.2", [("c4", 0.5), ("wikitext2", 0.3), ("a.txt", 0.2)]),
        ("c4:1, self : 3", [("c4", 1), ("self", 3)]),
        ("c4:0.4", [("c4", 0.4)]),
        ("none.txt:1e-3,c4:2", [("none.txt", 0.001), ("c4", 2)]),
        # Paths that exist are paths.
        ("x:1,y.txt:0.5,a.txt:0.5", [("x:1,y.txt", 0.5), ("a.txt", 0.5)]),
        ("c4:0.5,d.txt", [("c4:0.5,d.txt", 1)]),
        ("c4:0.5,d.txt:2,c4:1", [("c4:0.5,d.txt", 2), ("c4", 1)]),
        (
            'self(temperature=1.0,prompts="p,(1):2,q.txt"):0.5,self(top_p=0.9):0.5',
            [('self(temperature=1.0,prompts="p,(1):2,q.txt")', 0.5), ("self(top_p=0.9)", 0.5)],
        ),
    ],
)
def test_parts_of_a_mix(files: pathlib.Path, text: str, expected: list[tuple[str, float]]) -> None:
    assert parsed(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c4,wikitext2", "has no share in 'c4'"),
        ("c4:0.5,wikitext2", "has no share in 'wikitext2'"),
        ("c4:half", "has the share 'half', which is no number"),
        ("c4:0.5,wikitext2:", "has the share '', which is no number"),
        ("c4:0,wikitext2:1", "has the share 0 for c4: give a positive number"),
        ("c4:-1,wikitext2:1", "has the share -1 for c4"),
        ("c4:nan,wikitext2:1", "has the share nan for c4"),
        ("c4:inf,wikitext2:1", "has the share inf for c4"),
        ("c4:1e-400,wikitext2:1", "has the share 1e-400 for c4"),
        ("c4:0.5,c4:0.5", "names c4 twice: add its shares up"),
        ("c4:0.5,", "has no share in ''"),
        (":0.5,c4:0.5", "has no share in ':0.5'"),
        (",", "has no share in ''"),
        ("a:1," * 40, "has too many commas: mix 32 sources or fewer"),
    ],
)
def test_a_mix_without_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"^calibration=") as error:
        parse_parts(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_odd_texts_are_refused_or_one_source() -> None:
    draw = random.Random(0)
    pieces = ["c4", "self", "self(", "self()", ":", ",", ":0.5", ",", "(", ")", '"', "\0", " ", "é"]
    pieces += ["1e999", "~x/", "0.5", "nan", "'", "\n", "embedded", "1" * 400]
    for _ in range(2000):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 12)))
        try:
            parts = parse_parts(text)
        except InputError as error:
            assert error.field == "calibration" and len(str(error)) < 400
        else:
            assert parts and all(part.share > 0 for part in parts)


def test_calls_of_self_are_told_from_files() -> None:
    assert all(map(is_generated, ("self", "self(temperature=1)", "self(prompts='a)b')")))
    assert not any(map(is_generated, ("self.txt", "self(1):1,self(2)", "self(")))


# --- Counts.


def numpy_counts(shares: list[float], samples: int) -> list[int]:
    """Return window counts by largest remainder, in NumPy: one window after the other."""
    quotas = np.asarray(shares) / np.sum(shares) * samples
    counts = np.floor(quotas + 1e-9).astype(int)
    while counts.sum() < samples:
        counts[np.argmax(np.round(quotas - counts, 9))] += 1
    return counts.tolist()


def test_windows_are_counted_by_largest_remainder() -> None:
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randint(1, 6)
        shares = [draw.choice((0.1, 0.2, 0.25, 0.3, 0.29, 1, 2, 3)) for _ in range(count)]
        samples = draw.randint(60, 300)
        parts = [Part(str(i), Fraction(repr(share))) for i, share in enumerate(shares)]
        counts = window_counts(parts, samples)
        assert counts == numpy_counts(shares, samples) and sum(counts) == samples


def test_of_equal_remainders_the_first_is_rounded_up() -> None:
    assert window_counts(parse_parts("c4:0.5,wikitext2:0.25,ptb:0.25"), 6) == [3, 2, 1]
    assert window_counts(parse_parts("c4:0.1,wikitext2:0.2,ptb:0.7"), 10) == [1, 2, 7]


def test_a_share_without_a_window_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"^calibration_samples=10 leaves no window for ptb: raise it, or the share",
    ):
        mix("embedded:0.99,ptb:0.01")


# --- Windows.


def test_windows_of_a_mix_are_those_of_each_source_alone(files: pathlib.Path) -> None:
    """Independently: every part's rows, in order, are what the source alone gives."""
    ours = mix("a.txt:0.5,b.jsonl:0.3,embedded:0.2", samples=20, seed=4)
    alone = {
        source: calibrate(source, samples=count, seed=4)
        for source, count in (("a.txt", 10), ("b.jsonl", 6), ("embedded", 4))
    }
    place = [
        ((i + 0.5) / len(t.ids), k, t.ids[i])
        for k, t in enumerate(alone.values())
        for i in range(len(t.ids))
    ]
    expected = np.stack([row for _, _, row in sorted(place, key=lambda p: p[:2])])
    np.testing.assert_array_equal(ours.ids, expected)
    assert ours.ids.dtype == np.dtype("<i4")
    protocol = ours.protocol
    assert protocol["sha256"] == hashlib.sha256(expected.astype("<i4").tobytes()).hexdigest()
    assert (protocol["samples"], protocol["length"], protocol["seed"]) == (20, 32, 4)
    assert [
        (part["source"], part["share"], part["windows"], part["sha256"])
        for part in protocol["parts"]
    ] == [
        (source, share, len(tokens.ids), tokens.protocol["sha256"])
        for (source, tokens), share in zip(alone.items(), (0.5, 0.3, 0.2), strict=True)
    ]
    assert json.loads(json.dumps(protocol)) == protocol


def test_a_part_does_not_depend_on_the_others(files: pathlib.Path) -> None:
    one, two = mix("a.txt:1,b.jsonl:1"), mix("a.txt:1,embedded:1")
    assert one.protocol["parts"][0] == two.protocol["parts"][0]
    # Fewer windows are the first of more.
    more = mix("a.txt:3,b.jsonl:1", samples=20).ids
    fewer = calibrate("a.txt", samples=5).ids
    where = [np.flatnonzero((more == row).all(1)) for row in fewer]
    assert all(len(w) == 1 for w in where) and np.all(np.diff(np.concatenate(where)) > 0)


def test_shares_are_divided_by_their_sum(files: pathlib.Path) -> None:
    whole, halves = mix("a.txt:1,b.jsonl:1"), mix("a.txt:0.5,b.jsonl:0.5")
    np.testing.assert_array_equal(whole.ids, halves.ids)


@pytest.mark.parametrize("source", ["a.txt", "b.jsonl", "embedded", "t.npy"])
def test_a_mix_of_one_source_is_that_source(files: pathlib.Path, source: str) -> None:
    alone, mixed = mix(source), mix(f"{source}:0.3")
    np.testing.assert_array_equal(mixed.ids, alone.ids)
    assert mixed.protocol == alone.protocol == calibrate(source, samples=10).protocol


def test_every_beginning_holds_the_mix() -> None:
    for counts in ([64, 38, 26], [8, 8], [1, 31]):
        part = np.repeat(np.arange(len(counts)), counts)[interleaved(counts)]
        assert sorted(interleaved(counts)) == list(range(sum(counts)))
        for end in range(1, len(part) + 1):
            seen = np.bincount(part[:end], minlength=len(counts))
            assert np.abs(seen - np.asarray(counts) * end / sum(counts)).max() <= 1.0


def test_another_seed_draws_other_windows_of_every_part(files: pathlib.Path) -> None:
    one, two = mix("a.txt:1,t.npy:1", seed=1), mix("a.txt:1,t.npy:1", seed=2)
    for first, second in zip(one.protocol["parts"], two.protocol["parts"], strict=True):
        assert first["sha256"] != second["sha256"]


# --- Files of tokens.


def test_rows_of_a_token_file_are_drawn_in_the_order_of_the_file(files: pathlib.Path) -> None:
    rows = np.load("t.npy")
    ids = mix("t.npy:0.5,embedded:0.5", samples=20).ids
    found = [i for row in ids for i in np.flatnonzero((rows == row).all(1))]
    assert len(found) == 10 and sorted(set(found)) == found
    whole = mix("t.npy:0.5,embedded:0.5", samples=40).ids
    found = [i for row in whole for i in np.flatnonzero((rows == row).all(1))]
    assert found == list(range(20))


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (
            "t.npy:1,embedded:1",
            {"length": 16},
            "calibration=t.npy has windows of 32 tokens, the others of the mix have 16: "
            "give `calibration_length`=32",
        ),
        (
            "t.npy:1,embedded:1",
            {"samples": 50},
            "calibration=t.npy has 20 windows, its share of the mix is 25",
        ),
        ("ptb:1,none.txt:1", {}, "calibration=none.txt does not exist"),
        ("ptb:1,wikitext:1", {}, "calibration=wikitext is no known data source"),
        ("ptb:1,none.npy:1", {}, "calibration=none.npy does not exist"),
        ("embedded:1,self:1", {"samples": 0}, "calibration_samples=0 is too small"),
    ],
)
def test_a_mix_is_refused_before_anything_is_read(
    files: pathlib.Path, text: str, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError) as error:
        mix(text, **settings)
    # As library code writes settings; commands turn them into flags.
    assert str(error.value).startswith(message.replace("`", ""))


def test_the_shape_is_known_without_reading(files: pathlib.Path) -> None:
    assert check_parts(parse_parts("t.npy"), 5, 7) == (20, 32)
    assert check_parts(parse_parts("c4"), 5, 7) == (5, 7)
    assert check_parts(parse_parts("t.npy:1,c4:1"), 6, 32) == (6, 32)
