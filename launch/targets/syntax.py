"""Parse and print targets such as `params=100M` or `latency=1.3x@prefill:1x512`."""

import math
import re
from typing import Literal, NamedTuple, cast

from launch.flags.suggest import one_of
from models.errors import InputError

Kind = Literal["params", "weights", "memory", "latency"]
Phase = Literal["decode", "prefill"]
KINDS: tuple[Kind, ...] = ("params", "weights", "memory", "latency")
EXAMPLES = ("params=100M", "weights=400MiB", "memory=1.2GiB@8x4096", "latency=1.3x")
# The reader of one text, as a chat or a completion is.
DEFAULT_BATCH, DEFAULT_LENGTH = 1, 512
LARGEST_SIDE = 1 << 24  # of a batch, and tokens of a text

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_NUMBER = r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*"
_AMOUNT = re.compile(_NUMBER + r"([a-z]{0,3})", re.IGNORECASE)
_SPEEDUP = re.compile(_NUMBER + "x?", re.IGNORECASE)
_TEXTS = re.compile(r"(?:(decode|prefill):)?([0-9]{1,8})x([0-9]{1,8})", re.IGNORECASE)


class Target(NamedTuple):
    """A target.

    Attributes:
      text: The target as the user wrote it.
      kind: Quantity to bound.
      amount: Most parameters or bytes; for "latency" the least speed-up over the dense model.
      batch: Texts at a time, for "memory" and "latency".
      length: Tokens of each text; for "latency" those before the first new one.
      phase: Part of the work that "latency" means: new tokens, or the prompt.
    """

    text: str
    kind: Kind
    amount: float
    batch: int = DEFAULT_BATCH
    length: int = DEFAULT_LENGTH
    phase: Phase = "decode"

    @property
    def limit(self) -> float:
        """Return the most that a cost may be; of latency, the share of the dense model's time."""
        return 1 / self.amount if self.kind == "latency" else self.amount

    @property
    def workload(self) -> str:
        """Return the texts that it is for, such as `decode:1x512`; empty if there are none."""
        texts = f"{self.batch}x{self.length}"
        return {"memory": texts, "latency": f"{self.phase}:{texts}"}.get(self.kind, "")

    def value(self, cost: float) -> float:
        """Return a cost as reports have it: parameters, bytes, or a speed-up.

        Args:
          cost: Parameters, bytes, or the share of the dense model's time.
        """
        return 1 / cost if self.kind == "latency" else round(cost)

    def show_value(self, value: float) -> str:
        """Return a value of a report for people.

        Args:
          value: Parameters, bytes, or a speed-up.
        """
        return self.show(1 / value if self.kind == "latency" else value)

    def show(self, cost: float) -> str:
        """Return a cost for people: parameters, a size, or a speed-up.

        Args:
          cost: Parameters, bytes, or the share of the dense model's time.
        """
        if self.kind == "params":
            return f"{round(cost):,}"
        if self.kind == "latency":
            return f"{1 / cost:.2f}x"
        power = min((max(int(cost), 1).bit_length() - 1) // 10, 4)
        return f"{cost / 1024**power:,.2f} {('', 'Ki', 'Mi', 'Gi', 'Ti')[power]}B"

    def reachable(self, cost: float) -> str:
        """Return the target, as a user writes it, that this cost just meets.

        Args:
          cost: As in `show`.
        """
        if self.kind == "latency":
            text = f"latency={math.floor(100 / cost) / 100:.2f}x"
        elif self.kind == "params":
            text = f"params={_ceil(cost / 1e6)}M"
        else:
            text = f"{self.kind}={_ceil(cost / 2**20)}MiB"
        return f"{text}@{self.workload}" if self.workload else text


def _ceil(value: float) -> str:
    """Return a number rounded up to four digits, or to a whole number."""
    digits = max(0, 3 - math.floor(math.log10(value)))
    rounded = math.ceil(value * 10**digits) / 10**digits
    return f"{rounded:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{rounded:.0f}"


def parse_target(text: str, field: str = "target") -> Target:
    """Parse a target.

    Args:
      text: `params=100M`, `weights=400MiB`, `memory=1.2GiB@8x4096`, `latency=1.3x`, or
        `latency=1.3x@prefill:1x512`.
      field: Name of the setting, for errors.

    Raises:
      InputError: The text is no target, or its amount cannot be one.
    """
    try:
        return _parse(text)
    except _NoTarget as e:
        raise InputError(e.reason, e.remedy, field=field, value=text) from None


class _NoTarget(Exception):
    """Reason why a text is no target, and what to write instead."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def _parse(text: str) -> Target:
    """Parse a target, or raise _NoTarget."""
    name, equals, rest = (part.strip() for part in text.partition("="))
    if not equals:
        raise _NoTarget("is no target", f"give one such as {', '.join(EXAMPLES)}")
    if name not in KINDS:
        raise _NoTarget(f"has no kind {name!r}", one_of(name, KINDS))
    kind: Kind = name
    amount, at, texts = (part.strip() for part in rest.partition("@"))
    if kind == "latency":
        return _latency(text, amount, texts, bool(at))
    if at and kind != "memory":
        raise _NoTarget("takes no texts", f"leave @{texts} out")
    if kind == "memory" and not at:
        raise _NoTarget(
            "needs the texts that the cache holds", f"give memory={amount}@BATCHxLENGTH"
        )
    units = _COUNTS if kind == "params" else _BYTES
    match = _AMOUNT.fullmatch(amount)
    if not match or match[2].lower() not in units:
        wanted = "a number with K, M or B" if kind == "params" else "a size such as 400MiB or 1.2GB"
        raise _NoTarget(f"has no amount in {amount!r}", f"give {wanted}")
    number = float(match[1]) * units[match[2].lower()]
    if not number >= 1:
        raise _NoTarget("asks for nothing at all", "give a larger amount")
    if kind != "memory":
        return Target(text, kind, number)
    batch, length, phase = _texts(texts)
    if phase:
        raise _NoTarget(f"is for no part of the work such as {phase}", "give @BATCHxLENGTH")
    return Target(text, kind, number, batch, length)


def _latency(text: str, amount: str, texts: str, has_texts: bool) -> Target:
    """Parse a target of latency."""
    match = _SPEEDUP.fullmatch(amount)
    if not match or not 1 < float(match[1]) <= 1000:
        raise _NoTarget(f"has no speed-up in {amount!r}", "give one above 1 such as latency=1.3x")
    speedup = float(match[1])
    if not has_texts:
        return Target(text, "latency", speedup)
    batch, length, phase = _texts(texts)
    return Target(text, "latency", speedup, batch, length, phase or "decode")


def _texts(texts: str) -> tuple[int, int, Phase | None]:
    """Parse `BATCHxLENGTH`, with the part of the work before it or None."""
    match = _TEXTS.fullmatch(texts)
    sides = [int(match[2]), int(match[3])] if match else [0]
    if not match or not all(0 < side <= LARGEST_SIDE for side in sides):
        raise _NoTarget(
            f"has no texts in {texts!r}",
            "give BATCHxLENGTH such as 8x4096, for latency also prefill:1x512",
        )
    phase = cast(Phase, match[1].lower()) if match[1] else None
    return sides[0], sides[1], phase
