"""Frames as bytes: how the model reads them, and sums over them. Written from the RFCs, and for speed."""

from __future__ import annotations

from dataclasses import dataclass

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
WHOLE, FIRST, LATER = range(3)

MAX_TAGS = 2
MAX_EXTENSIONS = 6
MAX_QUOTED_EXTENSIONS = 3
MAPPED = bytes(10) + b"\xff\xff"

_TAGS = (b"\x81\x00", b"\x88\xa8")
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"


def number(data: bytes, at: int) -> int:
    """The 16 bits at an offset."""
    return data[at] << 8 | data[at + 1]


def ones(data: bytes) -> int:
    """The sum of RFC 1071, from 0 to 65534: 65535 is another 0. An odd byte is the upper half of its word."""
    if len(data) & 1:
        data += b"\0"
    return int.from_bytes(data, "big") % 65535


def check_of(*parts: bytes) -> int:
    """The checksum to be sent. All parts but the last have an even length."""
    return 65535 - (sum(map(ones, parts)) % 65535 or 65535)


def is_right(*parts: bytes) -> bool:
    """Do the parts, with the checksum in one of them, add up?"""
    return sum(map(ones, parts)) % 65535 == 0


def recheck(check: int, old: bytes, new: bytes) -> int:
    """RFC 1624, equation 3: the checksum after `old` became `new`. What was wrong stays wrong by as much."""
    return 65535 - ((65535 - check - ones(old) + ones(new) - 1) % 65535 + 1)


def pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + bytes((0, protocol)) + length.to_bytes(2, "big")
    return source + destination + length.to_bytes(4, "big") + bytes((0, 0, 0, protocol))


@dataclass(slots=True)
class Packet:
    """An IP packet in a frame. `at`: where it begins; `start`: where its transport does, which has `size` bytes."""

    frame: bytes
    at: int
    version: int
    source: bytes
    destination: bytes
    length: int
    hops: int
    protocol: int
    start: int = 0
    size: int = 0
    fragment: int = WHOLE
    ident: bytes = b""
    broken: bool = False
    ports: tuple[int, int] = (0, 0)
    flags: int = 0
    sequence: int = 0

    @property
    def end(self) -> int:
        """Behind it stands what the link layer padded the frame with."""
        return self.at + self.length

    @property
    def traffic_class(self) -> int:
        return self.frame[self.at + 1] if self.version == 4 else number(self.frame, self.at) >> 4 & 0xFF

    @property
    def is_icmp(self) -> bool:
        return self.protocol == (ICMP if self.version == 4 else ICMPV6)

    @property
    def opens(self) -> bool:
        """A SYN and nothing else: anybody can send one."""
        return self.flags & (SYN | ACK | FIN | RST) == SYN


def read(frame: bytes) -> Packet | None:
    """The IP packet of a frame; None where there is none, or not enough of it to say to whom it goes."""
    at = 12
    for _ in range(MAX_TAGS):
        if frame[at : at + 2] not in _TAGS:
            break
        at += 4
    kind = frame[at : at + 2]
    if kind == _IPV4:
        return _read_ipv4(frame, at + 2)
    if kind == _IPV6:
        return _read_ipv6(frame, at + 2)
    return None


def _read_ipv4(frame: bytes, at: int) -> Packet | None:
    if len(frame) < at + 20:
        return None
    header = (frame[at] & 15) * 4
    length = number(frame, at + 2)
    offset = number(frame, at + 6)
    p = Packet(frame, at, 4, frame[at + 12 : at + 16], frame[at + 16 : at + 20], length, frame[at + 8], frame[at + 9])
    p.start, p.size = at + header, length - header
    p.ident = frame[at + 4 : at + 6]
    p.fragment = LATER if offset & 0x1FFF else FIRST if offset & 0x2000 else WHOLE
    p.broken = frame[at] >> 4 != 4 or header < 20 or length < header or at + length > len(frame)
    return p


def _read_ipv6(frame: bytes, at: int) -> Packet | None:
    if len(frame) < at + 40:
        return None
    size = number(frame, at + 4)
    p = Packet(frame, at, 6, frame[at + 8 : at + 24], frame[at + 24 : at + 40], 40 + size, frame[at + 7], frame[at + 6])
    if p.source.startswith(MAPPED) or p.destination.startswith(MAPPED):
        return None  # RFC 4038 4.2: has no business on the wire
    p.start, p.size = at + 40, size
    p.broken = frame[at] >> 4 != 6 or at + p.length > len(frame)
    if not p.broken:
        _skip_extensions(p)
    return p


def _skip_extensions(p: Packet) -> None:
    """RFC 8200 4: to the transport header, or to the rest of a later fragment. Six are followed, no more."""
    for _ in range(MAX_EXTENSIONS):
        if p.protocol not in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT):
            return
        length = 8
        if p.start + 8 > len(p.frame):
            p.broken = True
            return
        if p.protocol == FRAGMENT:
            offset = number(p.frame, p.start + 2)
            p.ident = p.frame[p.start + 4 : p.start + 8]
            if offset & 0xFFF8:
                p.fragment = LATER
            elif offset & 1:
                p.fragment = FIRST
        else:
            length += p.frame[p.start + 1] * 8
        if length > p.size:
            p.broken = True
            return
        p.protocol = p.frame[p.start]
        p.start += length
        p.size -= length
        if p.fragment == LATER:
            return


def read_transport(p: Packet) -> bool:
    """Ports and flags of TCP or UDP; False where the header is not whole, or its lengths lie."""
    needed = 20 if p.protocol == TCP else 8
    if p.size < needed:
        return False
    header = p.frame[p.start : p.start + needed]
    if p.protocol == TCP:
        if not 20 <= (header[12] >> 4) * 4 <= p.size:
            return False
        p.flags, p.sequence = header[13], int.from_bytes(header[4:8], "big")
    else:
        length = number(header, 4)
        if length < 8 or (length > p.size and p.fragment == WHOLE):
            return False
    p.ports = number(header, 0), number(header, 2)
    return True


@dataclass(slots=True)
class Quoted:
    """The packet that an ICMP error is about. `at` and `start` are offsets in the error's frame."""

    at: int
    start: int
    source: bytes
    destination: bytes
    protocol: int
    ports: tuple[int, int] = (0, 0)


def read_error(p: Packet) -> Quoted | None:
    """What an ICMP error quotes, if it is one about TCP or UDP and quotes the 8 bytes of RFC 792; else None."""
    q = _read_quoted(p)
    if q is None or q.protocol not in (TCP, UDP) or q.start + 8 > p.end:
        return None
    q.ports = number(p.frame, q.start), number(p.frame, q.start + 2)
    return q


def read_report(p: Packet) -> tuple[Quoted, int] | None:
    """What a router found too big, and for what it would not have been: RFC 1191, RFC 8201."""
    q = _read_quoted(p)
    if q is None:
        return None
    kind, code = p.frame[p.start : p.start + 2]
    if (kind, code) != (3, 4) if p.version == 4 else kind != 2:
        return None
    rest = p.frame[p.start + 4 : p.start + 8]
    return q, int.from_bytes(rest[2:] if p.version == 4 else rest, "big")


def _read_quoted(p: Packet) -> Quoted | None:
    """The same about any protocol, without its ports."""
    if p.fragment != WHOLE or p.start + 8 > len(p.frame):
        return None
    if p.frame[p.start] not in ((3, 4, 11, 12) if p.version == 4 else (1, 2, 3, 4)):
        return None
    frame, at = p.frame, p.start + 8
    if p.version == 4:
        if at + 20 > len(frame) or frame[at] >> 4 != 4 or number(frame, at + 6) & 0x1FFF or frame[at] & 15 < 5:
            return None
        start, protocol = at + (frame[at] & 15) * 4, frame[at + 9]
        source, destination = frame[at + 12 : at + 16], frame[at + 16 : at + 20]
    else:
        if at + 40 > len(frame) or frame[at] >> 4 != 6:
            return None
        start, protocol = at + 40, frame[at + 6]
        source, destination = frame[at + 8 : at + 24], frame[at + 24 : at + 40]
        for _ in range(MAX_QUOTED_EXTENSIONS):
            if protocol not in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT):
                break
            if start + 8 > len(frame) or (protocol == FRAGMENT and number(frame, start + 2) & 0xFFF8):
                return None
            length = 8 if protocol == FRAGMENT else 8 + frame[start + 1] * 8
            protocol = frame[start]
            start += length
    return Quoted(at, start, source, destination, protocol)


def faults(frame: bytes, deep: bool = True) -> list[str]:
    """The checksums of a frame that do not add up, and lengths that do not; of a tunnel's inner packet as well."""
    p = read(frame)
    return ["no IP"] if p is None else _packet_faults(p, deep)


def _packet_faults(p: Packet, deep: bool) -> list[str]:
    if p.broken:
        return ["lengths"]
    found = []
    if p.version == 4 and not is_right(p.frame[p.at : p.start]):
        found.append("IPv4 checksum")
    if p.fragment != WHOLE:
        return found
    body = p.frame[p.start : p.end]
    if p.protocol in (TCP, UDP):
        if not read_transport(p):
            return [*found, "transport"]
        if p.protocol == UDP:
            body = body[: number(body, 4)]
            if body[6:8] == bytes(2):
                if deep and p.ports[1] == 6080 and len(body) > 28 and body[8] >> 4 in (4, 6):
                    found += _inner_faults(body[8:])
                return found
        if not is_right(pseudo(p.source, p.destination, p.protocol, len(body)), body):
            found.append("transport checksum")
    elif p.protocol == ICMP and p.version == 4:
        if not is_right(body):
            found.append("ICMP checksum")
    elif p.protocol == ICMPV6 and p.version == 6:
        if not is_right(pseudo(p.source, p.destination, ICMPV6, len(body)), body):
            found.append("ICMPv6 checksum")
    elif deep and p.protocol in (4, 41):
        found += _inner_faults(body)
    return found


def _inner_faults(body: bytes) -> list[str]:
    kind = _IPV4 if body[:1] and body[0] >> 4 == 4 else _IPV6
    return [f"inner {fault}" for fault in faults(bytes(12) + kind + body, False)]
