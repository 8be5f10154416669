"""Random numbers that depend on a seed and a key alone, not on what was drawn before."""

from __future__ import annotations

import hashlib
import math
import struct

_SCALE = 2.0**-64


def standard_normal(seed: int, stream: int, key: float) -> float:
    """A draw from the standard normal distribution: a hash of the arguments by Box and Muller.

    The same arguments give the same number on every machine; other seeds, streams or keys an
    independent one.
    """
    message = struct.pack("<Qqd", seed % 2**64, stream, key)
    radius, angle = struct.unpack("<QQ", hashlib.blake2b(message, digest_size=16).digest())
    return math.sqrt(-2.0 * math.log((radius + 1) * _SCALE)) * math.cos(math.tau * angle * _SCALE)
