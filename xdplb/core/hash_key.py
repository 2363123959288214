"""What all hashing in the packet path is keyed with. Pure: the secret comes in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HashKey:
    """What all hashing in the packet path is keyed with: two words drawn from the secret."""

    seed: int
    factor: int

    @property
    def name(self) -> str:
        """Tells keys apart, and nothing about them."""
        return hashlib.sha256(f"xdplb hash key\0{self.seed} {self.factor}".encode()).hexdigest()[:12]

    @classmethod
    def derive(cls, secret: str) -> HashKey:
        digest = hashlib.sha256(b"xdplb flow hash\0" + secret.encode()).digest()
        return cls(int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little") | 1)
