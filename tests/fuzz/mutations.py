"""Change bytes, JSON and values at random: what damage, haste and malice do to files."""

import copy
import json
import random
from typing import Any

# Text of JSON that stands in place of a value.
ODD_JSON = (
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1",
    "3",
    "1.5",
    "-0.0",
    "1e-320",
    "1e300",
    "1e400",
    "NaN",
    "-Infinity",
    str(2**31 - 1),
    str(2**31),
    str(2**63),
    str(2**64),
    "1" * 400,
    "1" * 5000,
    '""',
    '"x"',
    '"\\ud800"',
    '"\\udc00 half"',
    '"\\u0000"',
    '"' + "y" * 5000 + '"',
    "[]",
    "{}",
    "[[1]]",
    '{"a": {"b": 1}}',
    "[" * 1000 + "]" * 1000,
    '{"a":' * 900 + "1" + "}" * 900,
    "[" * 100_000,
)
ODD_INTEGERS = (0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to three faults."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        # Headers are at the front, and most of what can go wrong is in them.
        end = rng.choice((32, 256, 4096, max(len(data), 1)))
        at = rng.randrange(max(min(end, len(data)), 1))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if at < len(data) else b""
        elif kind == 1:
            data[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randint(1, 64)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        elif kind == 5:
            width = rng.choice((1, 2, 4, 8))
            odd = rng.choice(ODD_INTEGERS) % 256**width
            data[at : at + width] = odd.to_bytes(width, "little")
        elif kind == 6:
            data[at : at + rng.randint(1, 64)] = bytes(rng.randint(0, 64))
        else:
            data += rng.randbytes(rng.randint(1, 64))
    return bytes(data)


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the keys that lead to each value."""
    keys: Any = ()
    if isinstance(value, dict):
        keys = value.keys()
    elif isinstance(value, list):
        keys = range(min(len(value), 20))
    return [at, *(place for key in keys for place in _places(value[key], (*at, key)))]


def mutate_json(text: str, rng: random.Random) -> bytes:
    """Return JSON with one to three odd, absent or surplus values, or another encoding."""
    value, odd = copy.deepcopy(json.loads(text)), {}
    for k in range(rng.choice((1, 1, 1, 2, 3))):
        places = [place for place in _places(value) if place]
        if not places:
            break
        *path, last = rng.choice(places)
        node = value
        for key in path:
            node = node[key]
        kind = rng.randrange(8)
        if kind == 0:
            del node[last]
        elif kind == 1 and isinstance(node, dict):
            node[f"{last}x"] = node[last]
        else:
            name = f"odd value {k}"
            odd[json.dumps(name)] = rng.choice(ODD_JSON)
            node[last] = name
    result = json.dumps(value)
    for name, raw in odd.items():
        result = result.replace(name, raw)
    return encode(result, rng) if rng.random() < 0.15 else result.encode()


def encode(text: str, rng: random.Random) -> bytes:
    """Return text as other systems write it, or with faults in its bytes."""
    kind = rng.randrange(7)
    if kind == 0:
        return b"\xef\xbb\xbf" + text.encode()
    if kind == 1:
        return text.encode("utf-16")
    if kind == 2:
        return text.replace("\n", "\r\n").encode()
    if kind == 3:
        return text.encode("utf-16-le")
    if kind == 4:
        return b"\xff\xfe" + text.encode()
    if kind == 5:
        return text.encode("utf-32")
    return mutate_bytes(text.encode(), rng)
