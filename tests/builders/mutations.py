"""Seeded damage to real files: bit flips, cuts, overwritten headers, repeated and spliced pieces."""

import random
from collections.abc import Callable, Iterator, Sequence

HEADER_BYTES = 512


def flipped(payload: bytearray, rng: random.Random) -> bytearray:
    """Up to 64 bits flipped anywhere."""
    for _ in range(rng.randint(1, 64)):
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    return payload


def cut(payload: bytearray, rng: random.Random) -> bytearray:
    """The end missing."""
    return payload[: rng.randrange(len(payload))]


def edited_header(payload: bytearray, rng: random.Random) -> bytearray:
    """One to four bytes near the start set to an extreme: sizes, counts, offsets."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(min(HEADER_BYTES, len(payload)))
        value = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff", b"\x80\0", b"\xff", b"\0"])
        payload[start : start + len(value)] = value
    return payload


def repeated(payload: bytearray, rng: random.Random) -> bytearray:
    """A piece of the file twice."""
    start = rng.randrange(len(payload))
    piece = payload[start : start + rng.randint(1, 4096)]
    return payload[:start] + piece + payload[start:]


def removed(payload: bytearray, rng: random.Random) -> bytearray:
    """A piece of the file missing."""
    start = rng.randrange(len(payload))
    del payload[start : start + rng.randint(1, 256)]
    return payload


MUTATIONS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    flipped,
    cut,
    edited_header,
    repeated,
    removed,
)


def mutations(payloads: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged files, the same ones for the same seed."""
    rng = random.Random(seed)
    whole = [payload for payload in payloads if payload]
    for index in range(count):
        yield bytes(MUTATIONS[index % len(MUTATIONS)](bytearray(rng.choice(whole)), rng))
