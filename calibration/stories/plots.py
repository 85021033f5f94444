"""The plots of the stories in `calibration/stories/generator.py`: each returns the sentences of something that happens to two people."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from calibration.stories import words

_T = TypeVar("_T")

_VOWEL_SOUNDS = ("a", "e", "i", "o", "u", "honest")


class Draw:
    """Choices from one integer. Of `random.Random` only `random()` is used: the method whose sequence Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._uniform = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._uniform() * (high - low + 1))

    def pick(self, options: Sequence[_T]) -> _T:
        """One of the options, each as likely."""
        return options[self.between(0, len(options) - 1)]

    def several(self, options: Sequence[_T], count: int) -> list[_T]:
        """`count` different options, in a random order."""
        rest = list(options)
        return [rest.pop(self.between(0, len(rest) - 1)) for _ in range(count)]


class Person(NamedTuple):
    """Somebody in a story; formatted, the name. `role` is the hero's trait, or what the companion is to the hero."""

    name: str
    he: str
    his: str
    him: str
    role: str

    def __format__(self, _: str) -> str:
        return self.name


Plot = Callable[[Draw, Person, Person], list[str]]


def with_article(noun: str) -> str:
    """The noun, or whatever stands before it, after "a" or "an"."""
    return f"{'an' if noun.startswith(_VOWEL_SOUNDS) else 'a'} {noun}"


def _count(number: int, one: str, many: str) -> str:
    return f"{words.NUMBERS[number]} {one if number == 1 else many}"


def _toy(draw: Draw) -> tuple[str, str]:
    """A toy without and with its colour."""
    toy = draw.pick(words.TOYS)
    return toy, f"{draw.pick(words.COLOURS)} {toy}"


def _gather(draw: Draw, hero: Person, friend: Person) -> list[str]:
    one, many, where = draw.pick(words.GATHERED)
    start, found = draw.between(1, 6), draw.between(1, 5)
    given = draw.between(1, start + found - 1)
    box, total, left = draw.pick(words.CONTAINERS), start + found, start + found - given
    lost = [
        f"Then {hero.he} tripped and {_count(given, one, many)} fell out of the {box}.",
        f"{friend} counted what was left in the {box}: {_count(left, one, many)}.",
    ]
    shared = [
        f"{hero} gave {_count(given, one, many)} to {friend}.",
        f"So {friend} had {_count(given, one, many)} and {hero} had {_count(left, one, many)}.",
    ]
    return [
        f"{hero} had {_count(start, one, many)} in {hero.his} {box}.",
        draw.pick((f"{where.capitalize()}", f"Soon after, {where},"))
        + f" {hero.he} found {words.NUMBERS[found]} more {one if found == 1 else many}.",
        draw.pick(
            (
                f'"Now I have {_count(total, one, many)}!" said {hero}.',
                f"Now the {box} held {_count(total, one, many)}.",
            )
        ),
        *draw.pick((lost, shared)),
    ]


def _lose(draw: Draw, hero: Person, friend: Person) -> list[str]:
    toy, coloured = _toy(draw)
    *wrong, right = draw.several(words.SPOTS, draw.between(2, 4))
    searched = [
        f"{hero.he.capitalize()} looked {spot}, but the {toy} was not there." for spot in wrong
    ]
    return [
        draw.pick(
            (
                f"{hero} could not find {hero.his} {coloured}.",
                f"{hero} had lost {hero.his} {coloured}.",
            )
        ),
        *searched,
        f'"Have you seen my {coloured}?" {hero.he} asked {friend}.',
        draw.pick(
            (
                f'"Yes," said {friend}, "I saw it {right}."',
                f'"I think it is {right}," said {friend}.',
            )
        ),
        f"{hero} ran to look {right}, and there was the {coloured}!",
    ]


def _swap(draw: Draw, hero: Person, friend: Person) -> list[str]:
    (mine, my_coloured), (yours, your_coloured) = (
        (toy, f"{draw.pick(words.COLOURS)} {toy}") for toy in draw.several(words.TOYS, 2)
    )
    return [
        f"{hero} had {with_article(my_coloured)} and {friend} had {with_article(your_coloured)}.",
        f'"May I play with your {yours}?" asked {hero}.',
        f'"Yes, if I may play with your {mine}," said {friend}.',
        f"So {hero} took the {your_coloured} and {friend} took the {my_coloured}.",
        f"In the evening {hero} gave the {yours} back to {friend}, and {friend} gave the {mine} back to {hero}.",
    ]


def _mend(draw: Draw, hero: Person, friend: Person) -> list[str]:
    thing, harm, tool, fix = draw.pick(words.BROKEN)
    colour = draw.pick(words.COLOURS)
    return [
        draw.pick(
            (
                f"{hero} fell over a root",
                f"{hero} slipped on the wet grass",
                f"{hero} did not look where {hero.he} was going",
            )
        )
        + f", and the {colour} {thing} {harm}.",
        draw.pick(
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
    animal, food, home, favour = draw.pick(words.ANIMALS)
    size = draw.pick(("little", "big", "thin", "old", "young"))
    return [
        f"They met {with_article(size)} {animal} in front of its {home}.",
        draw.pick(
            (f'"I am so hungry," said the {animal}.', f"The {animal} looked hungry and sad.")
        ),
        f'"We must help the {animal}," {hero} told {friend}.',
        f"{friend} looked in {friend.his} bag and found a {food}.",
        f"The {size} {animal} ate the {food} and felt much better.",
        f"To say thank you, the {animal} {favour}. Then it went back to its {home}.",
    ]


def _hide(draw: Draw, hero: Person, friend: Person) -> list[str]:
    wrong, right = draw.several(words.SPOTS, 2)
    last = draw.between(3, 10)
    counting = ", ".join(words.NUMBERS[1 : last + 1]).capitalize()
    return [
        f'"Let us play hide and seek," said {friend}. "Count to {words.NUMBERS[last]}!"',
        f'{hero} closed {hero.his} eyes and counted. "{counting}!"',
        f"{friend} was hiding {right}.",
        f"First {hero} looked {wrong}, but nobody was there.",
        draw.pick(
            (
                f"Then {hero.he} heard {friend} laugh.",
                f"Then {hero.he} heard {friend} cough.",
                f"Then {hero.he} saw a foot.",
            )
        ),
        f'"You are {right}, {friend}!" cried {hero}, and {hero.he} was right.',
    ]


def _message(draw: Draw, hero: Person, friend: Person) -> list[str]:
    elder, he = draw.pick(words.ELDERS)
    news = draw.pick(words.NEWS)
    return [
        f"On the road {elder} stopped {hero}.",
        f'"Please tell {friend} that {news}," {he} said.',
        draw.pick(
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
    ways = draw.several(words.WAYS, 3)
    (first, _), (second, _), (third, _) = ways
    (_, back), (_, then), (_, last) = reversed(ways)
    sight = draw.pick(words.SIGHTS)
    return [
        f'"Let us go and see the {sight}," said {draw.pick((hero, friend))}.',
        f"They walked {first}, {second} and {third}.",
        draw.pick(
            (
                f"At last they saw the {sight}.",
                f"There was the {sight}!",
                f"The {sight} was bigger than they had thought.",
            )
        ),
        draw.pick(
            (
                f"{hero} and {friend} stayed until it got late.",
                f"{friend} made a picture of the {sight}.",
            )
        ),
        f"To get home they walked {back}, {then} and {last}.",
    ]


def _shop(draw: Draw, hero: Person, friend: Person) -> list[str]:
    ware, seller = draw.pick(words.WARES)
    purse, price = draw.between(2, 9), draw.between(2, 9)
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
    deed = draw.pick(words.CONTESTS)
    few, many = sorted(draw.several(range(2, len(words.NUMBERS)), 2))
    winner, loser = draw.several((hero, friend), 2)
    scores = draw.several(((winner, many), (loser, few)), 2)
    return [
        f'"Let us see who is better," said {loser}.',
        *(f"{person} {deed.format(words.NUMBERS[number])}." for person, number in scores),
        f"{words.NUMBERS[many].capitalize()} is more than {words.NUMBERS[few]}, so {winner} won.",
        draw.pick(
            (
                f'"Well done, {winner}!" said {loser}.',
                f"{loser} shook {winner.his} hand.",
                f"{winner} jumped for joy.",
            )
        ),
    ]


def _weather(draw: Draw, hero: Person, friend: Person) -> list[str]:
    sign, garment, harm = draw.pick(words.WEATHER)
    owner, other = draw.several((hero, friend), 2)
    return [
        f"On the way {sign}, so {owner} put on {owner.his} {garment}.",
        f"But {other} had left {other.his} {garment} at home, and soon {other.his} {harm}.",
        draw.pick(
            (
                f'"You can have mine, {other}," said {owner}.',
                f"{owner} saw it and was sorry for {other}.",
            )
        ),
        f"{owner} lent {other.him} the {garment}, and {other} felt much better.",
        f"When they came home, {other} gave the {garment} back to {owner}.",
    ]


def _riddle(draw: Draw, hero: Person, friend: Person) -> list[str]:
    (hint, answer), (_, wrong) = draw.several(words.RIDDLES, 2)
    colour = draw.pick(words.COLOURS)
    return [
        f"{friend} held something behind {friend.his} back.",
        draw.pick(
            (
                f'"Guess what it is," said {friend}. "It is {colour}."',
                f'"Can you guess what I have? It is {colour}," said {friend}.',
            )
        ),
        f'"Is it {with_article(wrong)}?" asked {hero}. "No," said {friend}. "{hint}."',
        f'"Then it must be {with_article(answer)}!" said {hero}.',
        f"{hero} was right, and {friend} gave {hero.him} the {colour} {answer}.",
    ]


PLOTS: tuple[Plot, ...] = (
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
