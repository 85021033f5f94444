"""Generate endless children's stories from a small grammar.

The embedded models are trained, calibrated and evaluated on them, without a download. A story is
about a hero and a companion and has one or two episodes. Its sentences depend on one another over
dozens of words: names, pronouns, colours, numbers, hiding places and the order of a walk come back
later. So a small transformer has structure to learn, and pruning can hurt it.

Every split reads the same sequence of stories and keeps those whose checksum is in its own residue
classes. A text therefore belongs to exactly one split, whatever the seed.
"""

import itertools
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from calibration.stories import words
from calibration.stories.episodes import EPISODES, Draw, Person, with_article

Split = Literal["train", "calibration", "evaluation"]

# A split's residues of the checksum modulo _CLASSES.
_RESIDUES: dict[Split, tuple[int, ...]] = {"train": (0, 1), "calibration": (2,), "evaluation": (3,)}
_CLASSES = 4


class _Detail(NamedTuple):
    """A sentence with a detail, and a sentence that recalls it at the end of the story."""

    mention: str
    recall: str


def _person(draw: Draw, he: str, role: str, taken: str = "") -> Person:
    """Choose a person.

    Args:
      draw: Random choices.
      he: "he" or "she"; empty to choose one.
      role: The person's role.
      taken: A name that the person may not have.
    """
    he = he or draw.choice(("he", "she"))
    names = words.BOYS if he == "he" else words.GIRLS
    # Sentences tell the two apart by name.
    name = draw.choice([name for name in names if name != taken])
    his, him = ("his", "him") if he == "he" else ("her", "her")
    return Person(name, he, his, him, role)


def _clothes(draw: Draw, hero: Person, friend: Person) -> _Detail:
    """Describe a garment."""
    wearer = draw.choice((hero, friend))
    garment = f"{draw.choice(words.COLOURS)} {draw.choice(words.GARMENTS)}"
    return _Detail(
        f"{wearer} wore {with_article(garment)}.", f"At bedtime {wearer} took off the {garment}."
    )


def _creatures(draw: Draw, hero: Person, friend: Person) -> _Detail:
    """Describe animals that one of the two saw."""
    seer, other = draw.sample((hero, friend), 2)
    number, colour = words.NUMBERS[draw.integer(2, 12)], draw.choice(words.COLOURS)
    seen = f"{number} {colour} {draw.choice(words.CREATURES)} {draw.choice(words.OUTDOORS)}"
    return _Detail(f"{seer} saw {seen}.", f"{other} could not believe that {seer} had seen {seen}.")


def _meal(draw: Draw, hero: Person, friend: Person) -> _Detail:
    """Describe a meal."""
    (first, second), drink = draw.sample(words.FOODS, 2), draw.choice(words.DRINKS)
    return _Detail(
        f"They ate {first} with {second} and drank {drink}.",
        f"For supper there was {drink} again, and {first} with {second}.",
    )


def _sky(draw: Draw, hero: Person, friend: Person) -> _Detail:
    """Describe the weather."""
    (first, second), season = draw.sample(words.SKIES, 2), draw.choice(words.SEASONS)
    return _Detail(
        f"It was a {first} and {second} {season} day.",
        f"It had been the best {season} day, though it was {first} and {second}.",
    )


def _dream(draw: Draw, hero: Person, friend: Person) -> _Detail:
    """Describe the trades that the two want to learn."""
    first, second = draw.sample(words.TRADES, 2)
    return _Detail(
        f"{hero} wanted to be a {first} some day, and {friend} wanted to be a {second}.",
        f"{hero} fell asleep and was a {first} in {hero.his} dream."
        f" {friend} dreamed of being a {second}.",
    )


_DETAILS = (_clothes, _creatures, _meal, _sky, _dream)


def _opening(draw: Draw, hero: Person, friend: Person, home: str) -> str:
    """Introduce the two."""
    child = f"{hero.role} {'boy' if hero.he == 'he' else 'girl'}"
    time = draw.choice(("One morning", "One day", "One afternoon", "One Sunday"))
    return draw.choice(
        (
            f"Once there was {with_article(child)} named {hero}."
            f" {hero.he.capitalize()} lived {home}."
            f" {time} {hero} went out with {hero.his} {friend.role} {friend}.",
            f"{hero} was {with_article(child)} who lived {home}."
            f" {time} {hero.his} {friend.role} {friend} came to play.",
        )
    )


def _ending(draw: Draw, hero: Person, friend: Person, home: str) -> str:
    """Write the last sentence."""
    child = f"{hero.role} {'boy' if hero.he == 'he' else 'girl'}"
    return draw.choice(
        (
            f'"You are the best {friend.role} in the world," {hero} said to {friend}.',
            f"Everyone {home.replace(' a ', ' the ')} said that {hero} was a very {child}.",
            f"{hero} and {hero.his} {friend.role} {friend} went home happy.",
            f"{hero} never forgot the day with {hero.his} {friend.role}.",
        )
    )


def _story(draw: Draw) -> str:
    """Write a story: one paragraph an episode, then an ending that recalls one of their details."""
    # The order of the draws is part of the text: the embedded models were trained on it.
    hero = _person(draw, "", draw.choice(words.TRAITS))
    role, he = draw.choice(words.ROLES)
    friend = _person(draw, he, role, taken=hero.name)
    home = draw.choice(words.HOMES)
    episodes = draw.sample(EPISODES, draw.integer(1, 2))
    details = [describe(draw, hero, friend) for describe in draw.sample(_DETAILS, len(episodes))]
    # Drawn even where a single episode leaves it out: later draws would change otherwise.
    bridge = draw.choice(
        (
            "But the day was not over.",
            "The next day was even better.",
            "A week later they met again.",
            "Then it got late.",
        )
    )
    starts = (_opening(draw, hero, friend, home), bridge)
    # Not strict: a single episode has no bridge.
    paragraphs = [
        " ".join([start, detail.mention, *episode(draw, hero, friend)])
        for start, detail, episode in zip(starts, details, episodes, strict=False)
    ]
    recalled = draw.choice(details).recall
    # The recall comes last: only the mention, far above, tells its words.
    return "\n".join([*paragraphs, f"{recalled} {_ending(draw, hero, friend, home)}"]) + "\n"


def stream(split: Split, seed: int = 0) -> Iterator[str]:
    """Generate the stories of one split, without end.

    No story is in two splits, whatever the seeds; within a split different seeds give different
    stories.

    Args:
      split: The split.
      seed: Decides the stories, the same on every platform and Python version.

    Returns:
      Stories of two or three paragraphs of plain ASCII, one paragraph a line, each story with a
      newline at its end.
    """
    # Not a generator function: an unknown split is refused at the call, not at the first story.
    residues = _RESIDUES[split]
    draw = Draw(seed)
    stories = (_story(draw) for _ in itertools.count())
    # A checksum, because Python's own hash of a text differs between processes.
    return (story for story in stories if zlib.crc32(story.encode()) % _CLASSES in residues)
