"""Episodes of the stories in `generator.py`: sentences of something that happens to two people."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from calibration.stories import words

_T = TypeVar("_T")

_VOWEL_SOUNDS = ("a", "e", "i", "o", "u", "honest")


class Draw:
    """Random choices that are the same on every platform and Python version."""

    def __init__(self, seed: int) -> None:
        # Python promises to keep the sequence of `random()`, of no other method.
        self._uniform = random.Random(seed).random

    def integer(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        return low + int(self._uniform() * (high - low + 1))

    def choice(self, options: Sequence[_T]) -> _T:
        """Return one of the options, each with the same probability."""
        return options[self.integer(0, len(options) - 1)]

    def sample(self, options: Sequence[_T], count: int) -> list[_T]:
        """Return `count` different options in a random order."""
        rest = list(options)
        return [rest.pop(self.integer(0, len(rest) - 1)) for _ in range(count)]


class Person(NamedTuple):
    """A person of a story; formats as the name.

    Attributes:
      name: The name.
      he: "he" or "she".
      his: "his" or "her", the possessive.
      him: "him" or "her", the object.
      role: The hero's trait, or the companion's relation to the hero.
    """

    name: str
    he: str
    his: str
    him: str
    role: str

    def __format__(self, _: str) -> str:
        return self.name


Episode = Callable[[Draw, Person, Person], list[str]]  # (draw, hero, companion) -> sentences


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun or the adjective before it."""
    return f"{'an' if noun.startswith(_VOWEL_SOUNDS) else 'a'} {noun}"


def _count(number: int, singular: str, plural: str) -> str:
    """Return a number in words with its noun."""
    return f"{words.NUMBERS[number]} {singular if number == 1 else plural}"


def _toy(draw: Draw) -> tuple[str, str]:
    """Choose a toy; return it without and with its colour."""
    toy = draw.choice(words.TOYS)
    return toy, f"{draw.choice(words.COLOURS)} {toy}"


def _gather(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Find more of a thing, then lose or share some."""
    singular, plural, where = draw.choice(words.GATHERED)
    start, more = draw.integer(1, 6), draw.integer(1, 5)
    given = draw.integer(1, start + more - 1)
    box, total, left = draw.choice(words.CONTAINERS), start + more, start + more - given
    lost = [
        f"Then {hero.he} tripped and {_count(given, singular, plural)} fell out of the {box}.",
        f"{friend} counted what was left in the {box}: {_count(left, singular, plural)}.",
    ]
    shared = [
        f"{hero} gave {_count(given, singular, plural)} to {friend}.",
        f"So {friend} had {_count(given, singular, plural)} "
        f"and {hero} had {_count(left, singular, plural)}.",
    ]
    return [
        f"{hero} had {_count(start, singular, plural)} in {hero.his} {box}.",
        draw.choice((f"{where.capitalize()}", f"Soon after, {where},"))
        + f" {hero.he} found {words.NUMBERS[more]} more {singular if more == 1 else plural}.",
        draw.choice(
            (
                f'"Now I have {_count(total, singular, plural)}!" said {hero}.',
                f"Now the {box} held {_count(total, singular, plural)}.",
            )
        ),
        *draw.choice((lost, shared)),
    ]


def _lose(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Look for a lost toy in the wrong places, then find it where the friend saw it."""
    toy, coloured = _toy(draw)
    *wrong, right = draw.sample(words.SPOTS, draw.integer(2, 4))
    searched = [
        f"{hero.he.capitalize()} looked {spot}, but the {toy} was not there." for spot in wrong
    ]
    return [
        draw.choice(
            (
                f"{hero} could not find {hero.his} {coloured}.",
                f"{hero} had lost {hero.his} {coloured}.",
            )
        ),
        *searched,
        f'"Have you seen my {coloured}?" {hero.he} asked {friend}.',
        draw.choice(
            (
                f'"Yes," said {friend}, "I saw it {right}."',
                f'"I think it is {right}," said {friend}.',
            )
        ),
        f"{hero} ran to look {right}, and there was the {coloured}!",
    ]


def _swap(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Exchange toys for a day."""
    (mine, my_coloured), (yours, your_coloured) = (
        (toy, f"{draw.choice(words.COLOURS)} {toy}") for toy in draw.sample(words.TOYS, 2)
    )
    return [
        f"{hero} had {with_article(my_coloured)} and {friend} had {with_article(your_coloured)}.",
        f'"May I play with your {yours}?" asked {hero}.',
        f'"Yes, if I may play with your {mine}," said {friend}.',
        f"So {hero} took the {your_coloured} and {friend} took the {my_coloured}.",
        f"In the evening {hero} gave the {yours} back to {friend}, "
        f"and {friend} gave the {mine} back to {hero}.",
    ]


def _mend(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Break a thing and have it mended."""
    thing, harm, tool, fix = draw.choice(words.BROKEN)
    colour = draw.choice(words.COLOURS)
    return [
        draw.choice(
            (
                f"{hero} fell over a root",
                f"{hero} slipped on the wet grass",
                f"{hero} did not look where {hero.he} was going",
            )
        )
        + f", and the {colour} {thing} {harm}.",
        draw.choice(
            (
                f"{hero} was very sad.",
                f"{hero} began to cry.",
                f'"Oh no, my {thing}!" cried {hero}.',
            )
        ),
        f'"Do not worry, {hero}," said {friend}, "I have a {tool}."',
        f"{friend} got the {tool} and {fix} the {thing} with care.",
        f'Soon the {colour} {thing} was as good as new. "Thank you, {friend}!" said {hero}.',
    ]


def _feed(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Feed an animal, which returns the favour."""
    animal, food, home, favour = draw.choice(words.ANIMALS)
    size = draw.choice(("little", "big", "thin", "old", "young"))
    return [
        f"They met {with_article(size)} {animal} in front of its {home}.",
        draw.choice(
            (f'"I am so hungry," said the {animal}.', f"The {animal} looked hungry and sad.")
        ),
        f'"We must help the {animal}," {hero} told {friend}.',
        f"{friend} looked in {friend.his} bag and found a {food}.",
        f"The {size} {animal} ate the {food} and felt much better.",
        f"To say thank you, the {animal} {favour}. Then it went back to its {home}.",
    ]


def _hide(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Play hide and seek."""
    wrong, right = draw.sample(words.SPOTS, 2)
    last = draw.integer(3, 10)
    counting = ", ".join(words.NUMBERS[1 : last + 1]).capitalize()
    return [
        f'"Let us play hide and seek," said {friend}. "Count to {words.NUMBERS[last]}!"',
        f'{hero} closed {hero.his} eyes and counted. "{counting}!"',
        f"{friend} was hiding {right}.",
        f"First {hero} looked {wrong}, but nobody was there.",
        draw.choice(
            (
                f"Then {hero.he} heard {friend} laugh.",
                f"Then {hero.he} heard {friend} cough.",
                f"Then {hero.he} saw a foot.",
            )
        ),
        f'"You are {right}, {friend}!" cried {hero}, and {hero.he} was right.',
    ]


def _message(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Carry a message to the friend."""
    elder, he = draw.choice(words.ELDERS)
    news = draw.choice(words.NEWS)
    return [
        f"On the road {elder} stopped {hero}.",
        f'"Please tell {friend} that {news}," {he} said.',
        draw.choice(
            (
                f"{hero} ran as fast as {hero.he} could.",
                f"{hero} did not wait.",
                f"{hero} said it again and again on the way.",
            )
        ),
        f'"{friend}, {elder} says that {news}," said {hero}.',
        f'"{news.capitalize()}? Then I must go at once!" said {friend}.',
    ]


def _journey(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Walk somewhere, and home by the same way in reverse."""
    ways = draw.sample(words.WAYS, 3)
    (first, _), (second, _), (third, _) = ways
    (_, back), (_, then), (_, last) = reversed(ways)
    sight = draw.choice(words.SIGHTS)
    return [
        f'"Let us go and see the {sight}," said {draw.choice((hero, friend))}.',
        f"They walked {first}, {second} and {third}.",
        draw.choice(
            (
                f"At last they saw the {sight}.",
                f"There was the {sight}!",
                f"The {sight} was bigger than they had thought.",
            )
        ),
        draw.choice(
            (
                f"{hero} and {friend} stayed until it got late.",
                f"{friend} made a picture of the {sight}.",
            )
        ),
        f"To get home they walked {back}, {then} and {last}.",
    ]


def _shop(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Buy something, with change left or with coins from the friend."""
    ware, seller = draw.choice(words.WARES)
    purse, price = draw.integer(2, 9), draw.integer(2, 9)
    short, change = (
        _count(max(price - purse, 0), "coin", "coins"),
        _count(max(purse - price, 0), "coin", "coins"),
    )
    enough = [
        f"{hero} paid and had {change} left.",
        f"{hero.he.capitalize()} shared the {ware} with {friend}.",
    ]
    too_little = [
        f'"Then I need {short} more," said {hero}.',
        f"{friend} gave {hero.him} {short}, and {hero} bought the {ware}.",
    ]
    return [
        f"{hero} went to the market with {_count(purse, 'coin', 'coins')}.",
        f'"How much is the {ware}?" {hero.he} asked the {seller}.',
        f'"It costs {_count(price, "coin", "coins")}," said the {seller}.',
        *(enough if purse >= price else too_little),
    ]


def _compete(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Compete, and let the higher number win."""
    deed = draw.choice(words.CONTESTS)
    few, many = sorted(draw.sample(range(2, len(words.NUMBERS)), 2))
    winner, loser = draw.sample((hero, friend), 2)
    scores = draw.sample(((winner, many), (loser, few)), 2)
    return [
        f'"Let us see who is better," said {loser}.',
        *(f"{person} {deed.format(words.NUMBERS[number])}." for person, number in scores),
        f"{words.NUMBERS[many].capitalize()} is more than {words.NUMBERS[few]}, so {winner} won.",
        draw.choice(
            (
                f'"Well done, {winner}!" said {loser}.',
                f"{loser} shook {winner.his} hand.",
                f"{winner} jumped for joy.",
            )
        ),
    ]


def _weather(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Lend a garment in bad weather, and get it back."""
    sign, garment, harm = draw.choice(words.WEATHER)
    owner, other = draw.sample((hero, friend), 2)
    return [
        f"On the way {sign}, so {owner} put on {owner.his} {garment}.",
        f"But {other} had left {other.his} {garment} at home, and soon {other.his} {harm}.",
        draw.choice(
            (
                f'"You can have mine, {other}," said {owner}.',
                f"{owner} saw it and was sorry for {other}.",
            )
        ),
        f"{owner} lent {other.him} the {garment}, and {other} felt much better.",
        f"When they came home, {other} gave the {garment} back to {owner}.",
    ]


def _riddle(draw: Draw, hero: Person, friend: Person) -> list[str]:
    """Guess a hidden thing from a hint."""
    (hint, answer), (_, wrong) = draw.sample(words.RIDDLES, 2)
    colour = draw.choice(words.COLOURS)
    return [
        f"{friend} held something behind {friend.his} back.",
        draw.choice(
            (
                f'"Guess what it is," said {friend}. "It is {colour}."',
                f'"Can you guess what I have? It is {colour}," said {friend}.',
            )
        ),
        f'"Is it {with_article(wrong)}?" asked {hero}. "No," said {friend}. "{hint}."',
        f'"Then it must be {with_article(answer)}!" said {hero}.',
        f"{hero} was right, and {friend} gave {hero.him} the {colour} {answer}.",
    ]


EPISODES: tuple[Episode, ...] = (
    _gather,
    _lose,
    _swap,
    _mend,
    _feed,
    _hide,
    _message,
    _journey,
    _shop,
    _compete,
    _weather,
    _riddle,
)
