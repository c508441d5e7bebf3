"""What damage does to bytes: streams in, streams out, a few hundred kilobytes of memory whatever the size. Pure, seeded."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

BITS_PER_FLIP = 10_000


def damaged(content: Iterable[bytes], size: int, how: str, seed: str) -> Iterator[bytes]:
    """The content (of `size` bytes, at least one) as the fault leaves it; always different from what it was.

    Args:
        content: The original; for `swap` that of another object, which must differ.
        size: Bytes of `content`.
        how: `random_bytes`, `truncate` (the first half stays), `bit_flip` (one bit in 10,000, at least one), `swap`.
        seed: The same seed makes the same damage.
    """
    rng = random.Random(seed)
    if how == "swap":
        yield from content
    elif how == "truncate":
        yield from _head(content, size // 2)
    elif how in ("random_bytes", "bit_flip"):
        change = _noise if how == "random_bytes" else _flip
        first = True
        for chunk in content:
            yield change(chunk, rng, first)
            first = False
    else:
        raise ValueError(f"no such damage: {how}")


def _head(content: Iterable[bytes], size: int) -> Iterator[bytes]:
    for chunk in content:
        if size <= 0:
            return
        yield chunk[:size]
        size -= len(chunk)


def _noise(chunk: bytes, rng: random.Random, first: bool) -> bytes:
    noise = bytearray(rng.randbytes(len(chunk)))
    if first and chunk:  # a single random byte may well be the one it was
        noise[0] = chunk[0] ^ rng.randint(1, 255)
    return bytes(noise)


def _flip(chunk: bytes, rng: random.Random, first: bool) -> bytes:
    bits = len(chunk) * 8
    changed = bytearray(chunk)
    for bit in rng.sample(range(bits), max(bits // BITS_PER_FLIP, 1 if first and bits else 0)):
        changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)
