"""What all kinds of checks share: what is checked, and what the layers are at which a check can fail."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from functools import lru_cache

from xdplb.model import Address, Check


@dataclass(frozen=True, slots=True)
class Via:
    """Through a service's `address`: a socket on the interface `device`, whose source port stands for the backend."""

    address: Address
    device: str
    source_port: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """All that the bytes and the times of a check depend on. `host` goes into Host and SNI; without it the address."""

    address: Address
    port: int
    check: Check
    host: str | None = None
    via: Via | None = None

    def __hash__(self) -> int:
        """Without the check: it has many fields, and few endpoints differ in nothing else."""
        return hash((self.address, self.port, self.host))

    @property
    def socket_address(self) -> tuple[str, int]:
        """What a socket connects to."""
        return str(self.via.address if self.via else self.address), self.port

    @property
    def literal(self) -> str:
        """The address as it stands before a port."""
        return f"[{self.address}]" if self.address.version == 6 else str(self.address)

    @property
    def phase(self) -> float:
        """In [0, 1): where in the interval the checks start. The same at every start of the daemon."""
        identity = f"{self.address} {self.port} {_in_words(self.check)} {self.host}".encode()
        return int.from_bytes(hashlib.blake2b(identity, digest_size=4).digest(), "big") / 2**32


@lru_cache(maxsize=4096)
def _in_words(check: Check) -> str:
    return str(check)


class Layer(enum.StrEnum):
    """The layer a check is at work on: what fails now fails there. PROC is a program that the check has started."""

    L3 = "L3"
    L4 = "L4"
    L6 = "L6"
    L7 = "L7"
    PROC = "PROC"

    @property
    def failure(self) -> str:
        if self is Layer.PROC:
            return "PROCERR"
        return f"{self}CON" if self in (Layer.L3, Layer.L4) else f"{self}RSP"

    @property
    def timeout(self) -> str:
        return f"{self}TOUT"
