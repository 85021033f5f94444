"""Mix calibration windows of several sources by shares, such as `c4:0.5,wikitext2:0.5`.

A part's windows are those that its source alone gives for that many windows and the same seed, so
they do not depend on the other parts. The windows of all parts are interleaved evenly: every
micro-batch, and every beginning of the windows, holds the mix.
"""

import pathlib
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from calibration.corpora import HUB, check_source
from calibration.data import Tokens, check_windows, is_token_file, token_shape
from calibration.digests import token_digest
from models.errors import InputError
from models.untrusted import shown_text

SELF = "self"  # the source whose windows the model itself writes
NAMES = ("embedded", *HUB, SELF)
MOST_PARTS = 32
# Bounds of a share; between them the sums of fractions stay small.
LEAST_SHARE, MOST_SHARE = 1e-9, 1e9
# Without parentheses outside quotes, so that two calls never look like one.
_SELF_CALL = re.compile(r"""self\((?:[^()'"]|'[^']*'|"[^"]*")*\)""")
FORM = "write every part as SOURCE:SHARE, such as c4:0.5,wikitext2:0.3,notes.txt:0.2"


class Part(NamedTuple):
    """A part of the calibration text.

    Attributes:
      source: Its source: a name, a file, or a call of `self`.
      share: Its share of the windows, before all shares are divided by their sum.
    """

    source: str
    share: Fraction


def is_generated(source: str) -> bool:
    """Return True if the model itself writes the windows of a source.

    Args:
      source: One source, without a share.
    """
    return source == SELF or _SELF_CALL.fullmatch(source) is not None


def parse_parts(text: str) -> tuple[Part, ...]:
    """Parse a source or a mix of sources; a path that exists is a path, whatever is in it.

    Args:
      text: One source, or several as SOURCE:SHARE, separated by commas.

    Returns:
      The parts; one alone where the text is no mix.

    Raises:
      InputError: A part has no share, its share is no positive number, or a source comes twice.
    """
    source, _, share = text.rpartition(":")
    plain = "," not in text and not _is_source(source) and _number(share) is None
    if _is_source(text) or plain:
        return (Part(text, Fraction(1)),)
    parts = tuple(_parse_part(item, text) for item in _items(text))
    sources = [part.source for part in parts]
    for source in sources:
        if sources.count(source) > 1:
            raise _error(f"names {shown_text(source)} twice", "add its shares up", text)
    return parts


def _items(text: str) -> list[str]:
    """Split a mix at the commas between its parts."""
    pieces, items = text.split(","), []
    if len(pieces) > MOST_PARTS:
        raise _error("has too many commas", f"mix {MOST_PARTS} sources or fewer", text)
    while pieces:
        # The longest first: a file's name may hold commas, and so may a call.
        for count in range(len(pieces), 0, -1):
            item = ",".join(pieces[:count]).strip()
            source, _, share = item.rpartition(":")
            if "," not in share and _is_source(source.strip()):
                break
        items.append(item)
        pieces = pieces[count:]
    return items


def _parse_part(item: str, text: str) -> Part:
    """Parse SOURCE:SHARE."""
    source, colon, share = (field.strip() for field in item.rpartition(":"))
    if not colon or not source or _is_source(item):
        raise _error(f"has no share in {shown_text(item)!r}", FORM, text)
    number = _number(share)
    if number is None:
        raise _error(f"has the share {shown_text(share)!r}, which is no number", FORM, text)
    if not LEAST_SHARE <= number <= MOST_SHARE:
        raise _error(
            f"has the share {shown_text(share)} for {shown_text(source)}",
            "give a positive number",
            text,
        )
    # The decimal digits as they stand, so that no rounding decides between equal remainders.
    return Part(source, Fraction(repr(number)))


def _is_source(text: str) -> bool:
    """Return True for a name, a call of `self`, or a path that exists."""
    if text in NAMES or is_generated(text):
        return True
    try:
        return bool(text) and pathlib.Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown home
        return False


def _number(text: str) -> float | None:
    """Return a number, None for other text."""
    try:
        return float(text)
    except ValueError:
        return None


def _error(reason: str, remedy: str, text: str) -> InputError:
    """Return the error for a mix that cannot be used."""
    return InputError(reason, remedy, field="calibration", value=shown_text(text))


def window_counts(parts: Sequence[Part], samples: int) -> list[int]:
    """Divide windows among parts by their shares: the largest remainders are rounded up.

    Args:
      parts: The parts; of equal remainders the first part's is larger.
      samples: Number of all windows.

    Returns:
      Windows of each part; they add up to `samples`.

    Raises:
      InputError: A part gets no window.
    """
    total = sum(part.share for part in parts)
    quotas = [part.share * samples / total for part in parts]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    for part, count in zip(parts, counts, strict=True):
        if count == 0:
            raise InputError(
                f"leaves no window for {shown_text(part.source)}",
                "raise it, or the share in `calibration`",
                field="calibration_samples",
                value=samples,
            )
    return counts


def check_parts(parts: Sequence[Part], samples: int, length: int) -> tuple[int, int]:
    """Check that parts can give the windows, as far as can be told without reading them.

    Args:
      parts: The parts.
      samples: Number of all windows.
      length: Tokens in a window.

    Returns:
      Samples and length of the windows; those of the file where a `.npy` file is the only part.

    Raises:
      InputError: There are too many windows, a part gets none, a file does not exist, or a `.npy`
        file has too few windows or others.
    """
    if len(parts) == 1 and is_token_file(parts[0].source):
        return token_shape(parts[0].source, "calibration")
    check_windows(samples, length)
    if len(parts) == 1:
        return samples, length
    # Of every part before any is read: reading may be a download, or the work of a model.
    for part, count in zip(parts, window_counts(parts, samples), strict=True):
        if is_token_file(part.source):
            _check_file(part.source, count, length)
        elif part.source != "embedded" and not is_generated(part.source):
            check_source(part.source, "calibration")
    return samples, length


def _check_file(source: str, count: int, length: int) -> None:
    """Check that a `.npy` file has the windows of its part of a mix."""
    has, width = token_shape(source, "calibration")
    if width != length:
        raise InputError(
            f"has windows of {width} tokens, the others of the mix have {length}",
            f"give `calibration_length`={width}, or another file",
            field="calibration",
            value=source,
        )
    if has < count:
        raise InputError(
            f"has {has} windows, its share of the mix is {count}",
            "lower its share, or `calibration_samples`",
            field="calibration",
            value=source,
        )


def mixed_windows(
    parts: Sequence[Part],
    read: Callable[[str, int], Tokens],
    *,
    samples: int,
    length: int,
    seed: int,
) -> Tokens:
    """Read the windows of all parts and interleave them.

    Args:
      parts: The parts. One alone is read as it is.
      read: (source, windows) -> windows of one source. Of a `.npy` file, which is read whole, as
        many rows as needed are drawn.
      samples: Number of all windows.
      length: Tokens in a window.
      seed: Decides the windows of each part.

    Returns:
      The windows.

    Raises:
      InputError: As for `check_parts` and `read`.
    """
    if len(parts) == 1:
        return read(parts[0].source, samples)
    check_parts(parts, samples, length)
    total = sum(part.share for part in parts)
    ids, records = [], []
    warnings: list[str] = []
    for part, count in zip(parts, window_counts(parts, samples), strict=True):
        tokens = _drawn(read(part.source, count), count, seed)
        ids.append(tokens.ids)
        records.append(_record(part.source, float(part.share / total), tokens))
        warnings += tokens.warnings
    mixed = np.concatenate(ids)[interleaved([len(rows) for rows in ids])]
    protocol = {
        "source": ",".join(f"{part.source}:{float(part.share):g}" for part in parts),
        "seed": seed,
        "cut": "windows of several sources, interleaved",
        "parts": records,
        "sha256": token_digest(mixed),
        "samples": samples,
        "length": length,
    }
    return Tokens(mixed, protocol, tuple(warnings))


def interleaved(counts: Sequence[int]) -> np.ndarray:
    """Return an order that spreads each part evenly over the whole.

    Args:
      counts: Number of items of each part.

    Returns:
      Indices into the parts' items one behind the other, int [items].
    """
    # The middles of equal intervals; of equal places the first part's comes first.
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.argsort(places, kind="stable")


def _drawn(tokens: Tokens, count: int, seed: int) -> Tokens:
    """Draw windows from those of a file that has more, in the file's order."""
    if len(tokens.ids) == count:
        return tokens
    rows = sorted(random.Random(seed).sample(range(len(tokens.ids)), count))
    ids = tokens.ids[rows]
    digest = {"sha256": token_digest(ids), "cut": "random windows of the file"}
    return Tokens(ids, tokens.protocol | digest, tokens.warnings)


def _record(source: str, share: float, tokens: Tokens) -> dict[str, Any]:
    """Return a part's entry of the report."""
    common = ("source", "seed", "samples", "length")
    own = {key: value for key, value in tokens.protocol.items() if key not in common}
    return {"source": source, "share": share, "windows": len(tokens.ids), **own}
