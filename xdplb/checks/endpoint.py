"""What all kinds of checks share: what is checked, how far a check has got, and what an attempt comes to."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Protocol

from yarl import URL

from xdplb.model import Address, Check


@dataclass(frozen=True, slots=True)
class Endpoint:
    """All that the bytes and the times of a check depend on. `host` goes into Host and SNI; without it the address."""

    address: Address
    port: int
    check: Check
    host: str | None = None

    @property
    def url(self) -> URL:
        literal = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return URL(f"{self.check.type}://{literal}:{self.port}{self.check.path}")

    @property
    def phase(self) -> float:
        """In [0, 1): where in the interval the checks start. The same at every start of the daemon."""
        identity = f"{self.address} {self.port} {self.check} {self.host}".encode()
        return int.from_bytes(hashlib.blake2b(identity, digest_size=4).digest(), "big") / 2**32


class Layer(enum.StrEnum):
    """The layer a check is at work on: what fails now fails there."""

    L4 = "L4"
    L6 = "L6"
    L7 = "L7"

    @property
    def failure(self) -> str:
        return "L4CON" if self is Layer.L4 else f"{self}RSP"

    @property
    def timeout(self) -> str:
        return f"{self}TOUT"


@dataclass(slots=True)
class Progress:
    """How far a check has got; outlives the exception that ends it."""

    layer: Layer = Layer.L4


class Perform(Protocol):
    """One check on the wire, without time limit: (ok, reason). Every exception is a failure at `progress.layer`."""

    async def __call__(self, endpoint: Endpoint, progress: Progress) -> tuple[bool, str]: ...
