"""Paths of SLEB: what stays of a model without a unit."""

from pruning.structured.sleb_paths import Piece, Unit, remove_unit, whole_path

WRITERS = ("o", "down")
PATH = whole_path(3)


def test_a_whole_unit_drops_its_block() -> None:
    path, shared = remove_unit(PATH, Unit(1, WRITERS), WRITERS)
    assert path == (Piece(0), Piece(2)) and shared == 1


def test_a_half_silences_its_writer() -> None:
    path, shared = remove_unit(PATH, Unit(1, ("down",)), WRITERS)
    assert path == (Piece(0), Piece(1, ("down",)), Piece(2)) and shared == 1


def test_the_second_half_drops_the_block() -> None:
    """In whichever order the halves are removed."""
    for first, second in (WRITERS, WRITERS[::-1]):
        path = remove_unit(PATH, Unit(2, (first,)), WRITERS).path
        assert remove_unit(path, Unit(2, (second,)), WRITERS).path == PATH[:2]
