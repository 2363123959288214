"""What leaves: hop counts, NAT, tunnels, answers. Each from an input frame to an output frame, by the RFCs."""

from __future__ import annotations

from fuzz.gateway import Front, Server
from fuzz.wire import ACK, FIN, LATER, RST, SYN, TCP, UDP, Packet, Quoted, check_of, number, pseudo, read, recheck

ANSWER_HOPS = 64
MOST_QUOTED = 128
"""Of the packet that an ICMP error is about."""
LEAST_IPV6_MTU = 1280


def addressed(frame: bytes, mac: bytes, own_mac: bytes) -> bytes:
    return mac + own_mac + frame[12:]


def untagged(p: Packet, frame: bytes) -> bytes:
    """VLAN tags are a matter of the interface of arrival (docs/forward-modes.md)."""
    return frame[:12] + frame[p.at - 2 :]


def hop(p: Packet, frame: bytes, less: int = 1) -> bytes:
    """One hop less, or one more."""
    at = p.at
    if p.version == 6:
        return frame[: at + 7] + bytes((frame[at + 7] - less,)) + frame[at + 8 :]
    old = frame[at + 8 : at + 10]
    new = bytes((old[0] - less, old[1]))
    check = recheck(number(frame, at + 10), old, new).to_bytes(2, "big")
    return frame[: at + 8] + new + check + frame[at + 12 :]


Side = tuple[bytes, int]
"""An address, and a port; port 0: it stays."""


def _address_at(version: int, is_source: bool) -> int:
    return (12 if is_source else 16) if version == 4 else (8 if is_source else 24)


def _put(frame: bytearray, at: int, new: bytes) -> None:
    frame[at : at + len(new)] = new


def _patch(frame: bytearray, at: int, old: bytes, new: bytes, udp: bool = False) -> None:
    """A checksum, after what it covers changed. UDP's 0 is none (RFC 768), so none may become 0."""
    check = number(frame, at)
    if udp and not check:
        return
    check = recheck(check, old, new)
    _put(frame, at, ((check or 0xFFFF) if udp else check).to_bytes(2, "big"))


def translate(p: Packet, frame: bytes, source: Side | None = None, destination: Side | None = None) -> bytes:
    """NAT of a packet or of a fragment: later ones have neither ports nor a checksum."""
    out = bytearray(frame)
    old, new = b"", b""
    for side, is_source in ((source, True), (destination, False)):
        if side is None:
            continue
        at = p.at + _address_at(p.version, is_source)
        before = bytes(out[at : at + len(side[0])])
        _put(out, at, side[0])
        if p.version == 4:
            _patch(out, p.at + 10, before, side[0])
        old, new = old + before, new + side[0]
        if side[1] and p.fragment != LATER:
            at = p.start + (0 if is_source else 2)
            port = side[1].to_bytes(2, "big")
            old, new = old + bytes(out[at : at + 2]), new + port
            _put(out, at, port)
    if p.fragment != LATER:
        _patch(out, p.start + (16 if p.protocol == TCP else 6), old, new, p.protocol == UDP)
    return bytes(out)


def translate_error(
    p: Packet,
    q: Quoted,
    source: bytes | None = None,
    destination: bytes | None = None,
    quoted_source: Side | None = None,
    quoted_destination: Side | None = None,
) -> bytes:
    """NAT of an ICMP error: of its own addresses, and inside what it quotes, as far as that goes."""
    out = bytearray(p.frame)
    before = bytes(out[p.start :])
    old, new = b"", b""
    for side, is_source in ((quoted_source, True), (quoted_destination, False)):
        if side is None:
            continue
        at = q.at + _address_at(p.version, is_source)
        was = bytes(out[at : at + len(side[0])])
        _put(out, at, side[0])
        if p.version == 4:
            _patch(out, q.at + 10, was, side[0])
        old, new = old + was, new + side[0]
        if side[1]:
            at = q.start + (0 if is_source else 2)
            port = side[1].to_bytes(2, "big")
            old, new = old + bytes(out[at : at + 2]), new + port
            _put(out, at, port)
    at = q.start + (16 if q.protocol == TCP else 6)
    if at + 2 <= p.end:
        _patch(out, at, old, new, q.protocol == UDP)
    covered_old, covered_new = before, bytes(out[p.start :])
    for address, is_source in ((source, True), (destination, False)):
        if address is None:
            continue
        at = p.at + _address_at(p.version, is_source)
        was = bytes(out[at : at + len(address)])
        _put(out, at, address)
        if p.version == 4:
            _patch(out, p.at + 10, was, address)
        else:
            covered_old, covered_new = was + covered_old, address + covered_new
    _patch(out, p.start + 2, covered_old, covered_new)
    return bytes(out)


def outer_length(front: Front, server: Server) -> int:
    if front.forward not in ("ipip", "gue"):
        return 0
    return (20 if len(server.address) == 4 else 40) + (8 if front.forward == "gue" else 0)


def wrap(p: Packet, frame: bytes, front: Front, server: Server, own: bytes, hashed: int) -> bytes:
    """IP in IP (RFC 2003, 2473, 4213), or GUE variant 1. DSCP and ECN are those of the inner packet."""
    udp = b""
    protocol = 4 if p.version == 4 else 41
    if front.forward == "gue":
        protocol = UDP
        port = 0xC000 + (hashed >> 16 & 0x3FFF)
        udp = b"".join(n.to_bytes(2, "big") for n in (port, front.config.gue_port, 8 + p.length, 0))
    length = p.length + len(udp)
    if len(server.address) == 4:
        head = bytes((0x45, p.traffic_class)) + (20 + length).to_bytes(2, "big") + b"\0\0\x40\0"
        head += bytes((ANSWER_HOPS, protocol))
        check = check_of(head, own, server.address).to_bytes(2, "big")
        outer = head + check + own + server.address
    else:
        first = 6 << 28 | p.traffic_class << 20 | hashed & 0xFFFFF
        outer = first.to_bytes(4, "big") + length.to_bytes(2, "big") + bytes((protocol, ANSWER_HOPS))
        outer += own + server.address
    kind = b"\x08\x00" if len(server.address) == 4 else b"\x86\xdd"
    return frame[: p.at - 2] + kind + outer + udp + frame[p.at :]


def _answer(p: Packet, protocol: int, body: bytes) -> bytes:
    """From the addressee of the packet back to its sender, in the same frame."""
    link = p.frame[6:12] + p.frame[:6] + p.frame[12 : p.at]
    source, destination = p.destination, p.source
    if p.version == 4:
        head = b"\x45\0" + (20 + len(body)).to_bytes(2, "big") + b"\0\0\x40\0" + bytes((ANSWER_HOPS, protocol))
        check = check_of(head, source, destination).to_bytes(2, "big")
        return link + head + check + source + destination + body
    head = b"\x60\0\0\0" + len(body).to_bytes(2, "big") + bytes((protocol, ANSWER_HOPS))
    return link + head + source + destination + body


def reset(p: Packet) -> bytes:
    """RFC 9293 3.5.2: with the acknowledgement's sequence number, or else acknowledging all of the segment."""
    segment = p.frame[p.start : p.start + p.size]
    ports = segment[2:4] + segment[:2]
    if p.flags & ACK:
        numbers, flags = segment[8:12] + bytes(4), RST
    else:
        data = p.size - (segment[12] >> 4) * 4
        past = int.from_bytes(segment[4:8], "big") + data + bool(p.flags & SYN) + bool(p.flags & FIN)
        numbers, flags = bytes(4) + (past & 0xFFFFFFFF).to_bytes(4, "big"), RST | ACK
    body = ports + numbers + bytes((0x50, flags)) + bytes(6)
    check = check_of(pseudo(p.destination, p.source, TCP, 20), body).to_bytes(2, "big")
    return _answer(p, TCP, body[:16] + check + body[18:])


def _icmp(p: Packet, four: tuple[int, int], six: tuple[int, int], rest: int) -> bytes:
    kind, code = four if p.version == 4 else six
    quoted = p.frame[p.at : p.at + min(p.length // 4 * 4, MOST_QUOTED)]
    body = bytes((kind, code, 0, 0)) + rest.to_bytes(4, "big") + quoted
    above = pseudo(p.destination, p.source, 58, len(body)) if p.version == 6 else b""
    check = check_of(above, body).to_bytes(2, "big")
    return _answer(p, 1 if p.version == 4 else 58, body[:2] + check + body[4:])


def unreachable(p: Packet) -> bytes:
    return _icmp(p, (3, 3), (1, 4), 0)


def too_big(p: Packet, mtu: int) -> bytes:
    """An IPv6 host need not heed less than what each link carries (RFC 8201 4)."""
    return _icmp(p, (3, 4), (2, 0), mtu if p.version == 4 else max(mtu, LEAST_IPV6_MTU))


def fragments(p: Packet, frame: bytes, most: int) -> list[Packet]:
    """RFC 791 3.2: IPv4 packets of that size at most, without tags or padding, that are the packet together."""
    size = (most - 20) // 8 * 8
    pieces = []
    for offset in range(0, p.size, size):
        payload = frame[p.start + offset : p.end][:size]
        head = bytearray(frame[p.at : p.start])
        _put(head, 2, (20 + len(payload)).to_bytes(2, "big"))
        more = 0x2000 if offset + size < p.size else 0
        _put(head, 6, ((number(head, 6) + offset // 8 & 0xFFFF) | more).to_bytes(2, "big"))
        _patch(head, 10, frame[p.at + 2 : p.at + 4] + frame[p.at + 6 : p.at + 8], bytes(head[2:4] + head[6:8]))
        piece = read(frame[:12] + frame[p.at - 2 : p.at] + head + payload)
        assert piece is not None
        pieces.append(piece)
    return pieces
