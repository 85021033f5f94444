"""Endless children's stories from a small grammar: text the embedded models learn, calibrate and are judged on, with no download.

A story is about a hero and a companion and holds one or two plots. Its sentences depend on one another over dozens of words:
names, pronouns, colours, numbers, hiding places and the order of a walk come back later, so a small transformer has structure to
learn and loses something when it is pruned.

Every split reads the same sequence of stories and keeps the ones whose checksum falls into its own residue classes: a text
belongs to exactly one split, whatever the seed.
"""

import itertools
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from calibration.stories import words
from calibration.stories.plots import PLOTS, Draw, Person, with_article

Split = Literal["train", "calibration", "evaluation"]

_RESIDUES: dict[Split, tuple[int, ...]] = {"train": (0, 1), "calibration": (2,), "evaluation": (3,)}
_CLASSES = 4


class _Detail(NamedTuple):
    """Something told in passing, and the sentence that comes back to it at the end."""

    told: str
    recalled: str


def _person(draw: Draw, he: str, role: str, taken: str = "") -> Person:
    """Somebody of the gender `he` ("he", "she" or "" for either) whose name is not taken."""
    he = he or draw.pick(("he", "she"))
    name = draw.pick(
        [name for name in (words.BOYS if he == "he" else words.GIRLS) if name != taken]
    )
    return Person(name, he, *(("his", "him") if he == "he" else ("her", "her")), role)


def _clothes(draw: Draw, hero: Person, friend: Person) -> _Detail:
    wearer = draw.pick((hero, friend))
    garment = f"{draw.pick(words.COLOURS)} {draw.pick(words.GARMENTS)}"
    return _Detail(
        f"{wearer} wore {with_article(garment)}.", f"At bedtime {wearer} took off the {garment}."
    )


def _creatures(draw: Draw, hero: Person, friend: Person) -> _Detail:
    seer, other = draw.several((hero, friend), 2)
    number, colour = words.NUMBERS[draw.between(2, 12)], draw.pick(words.COLOURS)
    seen = f"{number} {colour} {draw.pick(words.CREATURES)} {draw.pick(words.OUTDOORS)}"
    return _Detail(f"{seer} saw {seen}.", f"{other} could not believe that {seer} had seen {seen}.")


def _meal(draw: Draw, hero: Person, friend: Person) -> _Detail:
    (one, two), drink = draw.several(words.FOODS, 2), draw.pick(words.DRINKS)
    return _Detail(
        f"They ate {one} with {two} and drank {drink}.",
        f"For supper there was {drink} again, and {one} with {two}.",
    )


def _sky(draw: Draw, hero: Person, friend: Person) -> _Detail:
    (one, two), season = draw.several(words.SKIES, 2), draw.pick(words.SEASONS)
    return _Detail(
        f"It was a {one} and {two} {season} day.",
        f"It had been the best {season} day, though it was {one} and {two}.",
    )


def _dream(draw: Draw, hero: Person, friend: Person) -> _Detail:
    one, two = draw.several(words.TRADES, 2)
    return _Detail(
        f"{hero} wanted to be a {one} some day, and {friend} wanted to be a {two}.",
        f"{hero} fell asleep and was a {one} in {hero.his} dream. {friend} dreamed of being a {two}.",
    )


_DETAILS = (_clothes, _creatures, _meal, _sky, _dream)


def _opening(draw: Draw, hero: Person, friend: Person, home: str) -> str:
    child = f"{hero.role} {'boy' if hero.he == 'he' else 'girl'}"
    time = draw.pick(("One morning", "One day", "One afternoon", "One Sunday"))
    return draw.pick(
        (
            f"Once there was {with_article(child)} named {hero}. {hero.he.capitalize()} lived {home}."
            f" {time} {hero} went out with {hero.his} {friend.role} {friend}.",
            f"{hero} was {with_article(child)} who lived {home}. {time} {hero.his} {friend.role} {friend} came to play.",
        )
    )


def _ending(draw: Draw, hero: Person, friend: Person, home: str) -> str:
    child = f"{hero.role} {'boy' if hero.he == 'he' else 'girl'}"
    return draw.pick(
        (
            f'"You are the best {friend.role} in the world," {hero} said to {friend}.',
            f"Everyone {home.replace(' a ', ' the ')} said that {hero} was a very {child}.",
            f"{hero} and {hero.his} {friend.role} {friend} went home happy.",
            f"{hero} never forgot the day with {hero.his} {friend.role}.",
        )
    )


def _story(draw: Draw) -> str:
    """A paragraph a plot, each with a detail, and an ending that comes back to one of the details."""
    hero = _person(draw, "", draw.pick(words.TRAITS))
    role, he = draw.pick(words.ROLES)
    friend, home = _person(draw, he, role, taken=hero.name), draw.pick(words.HOMES)
    plots = draw.several(PLOTS, draw.between(1, 2))
    details = [detail(draw, hero, friend) for detail in draw.several(_DETAILS, len(plots))]
    bridge = draw.pick(
        (
            "But the day was not over.",
            "The next day was even better.",
            "A week later they met again.",
            "Then it got late.",
        )
    )
    starts = (_opening(draw, hero, friend, home), bridge)
    paragraphs = [
        " ".join([start, detail.told, *plot(draw, hero, friend)])
        for start, detail, plot in zip(starts, details, plots, strict=False)
    ]
    return (
        "\n".join(
            [*paragraphs, f"{draw.pick(details).recalled} {_ending(draw, hero, friend, home)}"]
        )
        + "\n"
    )


def stream(split: Split, seed: int = 0) -> Iterator[str]:
    """Endless stories of one split: each is two or three paragraphs of plain ASCII, a line each, and ends with a newline.

    The same split and seed give the same stories on every platform and Python version. No story is in two splits, whatever the
    seeds; within a split different seeds give different stories.
    """
    residues, draw = _RESIDUES[split], Draw(seed)
    stories = (_story(draw) for _ in itertools.count())
    return (story for story in stories if zlib.crc32(story.encode()) % _CLASSES in residues)
