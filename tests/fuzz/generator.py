"""Frames and sequences of them, drawn from a seed: whole packets of the gateway's own kind, then damaged in many ways.

Packets answer and quote what was seen leave, so that replies, errors and fragments hit what the packet path remembers.
"""

from __future__ import annotations

from collections import deque
from ipaddress import ip_address
from random import Random

from packets import BACK_MAC, BACKEND_MAC, BEHIND_ROUTER, CLIENT, CLIENT_MAC, FRONT_MAC, ROUTER
from world import NARROW, OWN, UNREACHABLE

from fuzz.arena import LARGEST, Arena, Result, Step
from fuzz.wire import (
    ACK,
    DESTINATION,
    FIN,
    FRAGMENT,
    HOP_BY_HOP,
    ICMP,
    ICMPV6,
    PSH,
    ROUTING,
    RST,
    SYN,
    TCP,
    UDP,
    check_of,
    number,
    ones,
    pseudo,
    read,
)

_MACS = [bytes.fromhex(mac.replace(":", "")) for mac in (FRONT_MAC, CLIENT_MAC, BACKEND_MAC)]
_OWN_MACS = {side: bytes.fromhex(mac.replace(":", "")) for side, mac in (("front", FRONT_MAC), ("back", BACK_MAC))}
_MANY = (b"\xff" * 6, bytes.fromhex("01005e000005"), bytes.fromhex("333300000001"))
_FLAGS = (SYN,) * 6 + (ACK,) * 6 + (PSH | ACK,) * 4 + (FIN | ACK,) * 3 + (RST, RST | ACK, SYN | ACK, FIN, 0, SYN | FIN)
_TAGS = (b"\x81\x00", b"\x88\xa8")
_TCIS = (b"\x00\x05", b"\x00\x00", b"\xe0\x00", b"\x60\x07")
_AGES = (1, 30, 59, 60, 61, 121, 301, 540, 899, 901)
_OLDEST = 2000
"""Ticks of a sequence: after 4096 of them a flow looks young again, unless the control plane comes by."""
_ODD = {
    4: ("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "169.254.1.1", "192.0.2.77", "10.0.1.254"),
    6: ("::", "::1", "ff02::1", "fe80::1", "fec0::1", "::ffff:192.0.2.9", "64:ff9b::1", "2001:db8:c::77", "fd00:1::fe"),
}
_SIZES = (1220, 1231, 1252, 1272, 1432, 1452, 1460, 1472, 1473, 1480, 1505, 1600, 1900, 2008, 2041, 3260, 3272, 3273)
"""Around what just fits some way, or is cut for it."""
_STEPS = (0, 0, 1, 1, 1, 1000, 65535, 65536, 65537, -1, -1000, 1 << 31)
"""From a SYN's number: what follows it is less than 65536 away."""
_INTERESTING = (0, 1, 7, 8, 19, 20, 21, 39, 40, 41, 127, 128, 255, 576, 1280, 1500, 32767, 65535)


class Generator:
    def __init__(self, arena: Arena, seed: int) -> None:
        self.random = Random(seed)
        self.arena = arena
        self.fronts = list(arena.gateway.fronts.values())
        self.begins = True
        self.aged = 0
        self.came: deque[tuple[str, bytes]] = deque(maxlen=40)
        self.left: deque[tuple[str, bytes]] = deque(maxlen=40)
        """Frames of late as they came and were sent to a backend, and as they left, each with its side."""
        self.syns: dict[tuple[bytes, bytes, bytes], deque[int]] = {}
        """By addresses and ports, the numbers of the last SYNs."""
        self.cut: deque[tuple[str, bytes]] = deque(maxlen=24)
        """Fragments that are still to come."""
        own = [f.address for f in self.fronts] + arena.gateway.pool + list(arena.gateway.answering)
        self.clients = {
            version: [
                ip_address(text[version]).packed
                for text in (CLIENT, CLIENT, CLIENT, ROUTER, BEHIND_ROUTER, NARROW, UNREACHABLE, OWN)
            ]
            for version in (4, 6)
        }
        self.odd = {
            version: [ip_address(text).packed for text in _ODD[version]]
            + [address for address in own if len(address) == (4 if version == 4 else 16)]
            for version in (4, 6)
        }
        self.backends = list(arena.gateway.servers.values())
        self.damage = self.random.choice((0.0, 0.1, 0.3, 0.6))
        self.focus = self.random.sample(self.fronts, min(len(self.fronts), self.random.choice((2, 6, 200))))

    # Steps.

    def step(self) -> Step:
        r = self.random.random()
        if self.begins:
            self.begins = False
            if self.arena.gateway.pool and r < 0.04:
                return Step("fill", b"answered" if r < 0.01 else b"unanswered")
        if r < 0.005 and self.aged < _OLDEST:
            ticks = self.random.choice(_AGES)
            self.aged += ticks
            return Step("age", str(ticks).encode())
        if r < 0.015:
            return self._change()
        if r < 0.025 and self.arena.gateway.tunnels:
            return Step("heed")
        side, frame = self._frame()
        if self.random.random() < self.damage:
            frame = self._damage(frame)
        return Step(side, frame[:LARGEST].ljust(14, b"\0"))

    def learn(self, step: Step, result: Result | None) -> None:
        """What left the gateway, for others to answer."""
        to_backend = result is not None and result.rule.startswith("to backend")
        if result and (result.seen.verdict > 2 or to_backend):
            if to_backend:
                self.came.append((step.what, step.argument))
            self.left.extend(("back", left) for left in result.seen.pieces or [result.seen.frame])
        elif result and self.random.random() < 0.05:
            self.left.append((step.what, step.argument.ljust(34, b"\0")))

    def _change(self) -> Step:
        front = self.random.choice(self.focus)
        server = self.random.choice(list(front.servers.values()))
        what = self.random.choice(("fail", "fail", "settle", "recover", "drain", "ready"))
        return Step(what, server.name.encode())

    def _frame(self) -> tuple[str, bytes]:
        r = self.random.random()
        if self.cut and r < 0.25:
            place = self.random.randrange(len(self.cut))
            found = self.cut[place]
            if r < 0.22:
                del self.cut[place]
            return found
        if self.came and r < 0.55:
            return self._next(*self.random.choice(self.came))
        if self.left and r < 0.8:
            about_answer = bool(self.came) and self.random.random() < 0.4
            side, frame = self.random.choice(self.came if about_answer else self.left)
            if r < 0.64:
                return self._answer(side, frame)
            return self._error(side, frame, about_answer) if r < 0.76 else (side, frame)
        return self._to_service()

    # Whole packets.

    def _to_service(self) -> tuple[str, bytes]:
        random = self.random
        front = random.choice(self.focus)
        version = 4 if len(front.address) == 4 else 6
        source, destination = self._client(version), front.address
        port = random.randint(front.first_port, front.last_port)
        protocol = front.protocol
        r = random.random()
        if r < 0.03:
            destination = random.choice(self.odd[version])
        elif r < 0.06:
            destination, port = self._backend(version)
        elif r < 0.09:
            port = random.choice((0, 53, 80, 90, 443, 1023, 1024, 8000, 65535))
        elif r < 0.11:
            protocol = random.choice((TCP, UDP, 47, 50, 132, ICMP, ICMPV6, 59))
        elif r < 0.14:
            source, source_port = self._backend(version)
            return self._whole(version, source, self._client(version), source_port, 40000, protocol)
        return self._whole(version, source, destination, self._client_port(), port, protocol)

    def _client(self, version: int) -> bytes:
        r = self.random.random()
        if r < 0.06:
            return self.random.choice(self.odd[version])
        if r < 0.7:
            return self.random.choice(self.clients[version])
        host = self.random.randrange(60)
        return bytes((203, 0, 200, host)) if version == 4 else ip_address("2001:db8:77::").packed[:15] + bytes((host,))

    def _client_port(self) -> int:
        return self.random.choice((40000, 40001, 40002, 1024, 65535, 0, 80, self.random.randrange(65536)))

    def _backend(self, version: int) -> tuple[bytes, int]:
        server = self.random.choice(self.backends)
        if (len(server.address) == 4) is not (version == 4):
            return self.random.choice(self.odd[version]), 80
        return server.address, server.port or self.random.choice((80, 53, 90, 8000))

    def _whole(
        self, version: int, source: bytes, destination: bytes, sport: int, dport: int, protocol: int
    ) -> tuple[str, bytes]:
        body = self._transport(source, destination, sport, dport, protocol)
        side = "front" if self.random.random() < 0.8 else "back"
        return self._packet(side, version, source, destination, protocol, body)

    def _payload(self) -> bytes:
        r = self.random.random()
        if r < 0.2:
            size = 0
        elif r < 0.8:
            size = self.random.randrange(40)
        elif r < 0.89:
            size = self.random.choice(_SIZES)
        elif r < 0.91:
            size = self.random.randrange(1500, 3300)
        else:
            size = self.random.randrange(1500)
        return self.random.randbytes(size)

    def _transport(self, source: bytes, destination: bytes, sport: int, dport: int, protocol: int) -> bytes:
        random = self.random
        ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
        payload = self._payload()
        if protocol == TCP:
            options = random.choice((b"", b"", b"\x02\x04\x05\xb4", b"\x01" * 40))
            flags = random.choice(_FLAGS) if random.random() < 0.97 else random.randrange(256)
            numbers = self._numbers((source, destination, ports), flags)
            head = ports + numbers + bytes(((5 + len(options) // 4) << 4, flags)) + b"\xff\xff\0\0\0\0"
            body, at = head + options + payload, 16
        elif protocol == UDP:
            body, at = ports + (8 + len(payload)).to_bytes(2, "big") + bytes(2) + payload, 6
            if random.random() < 0.1:
                return body
        elif protocol in (ICMP, ICMPV6):
            kind = random.choice((0, 8, 3, 13) if protocol == ICMP else (128, 129, 1, 135))
            body, at = bytes((kind, 0, 0, 0)) + ports + payload, 2
        else:
            return ports + payload
        above = b"" if protocol == ICMP else pseudo(source, destination, protocol, len(body))
        check = check_of(above, body)
        first = len(body) - len(payload)
        if protocol in (TCP, UDP) and len(payload) > 1 and random.random() < 0.04:
            wanted = self._corner(destination, dport)
            word = (number(body, first) + check - wanted) % 65535
            body, check = body[:first] + word.to_bytes(2, "big") + body[first + 2 :], wanted
        if protocol == UDP:
            check = check or 0xFFFF
        return body[:at] + check.to_bytes(2, "big") + body[at + 2 :]

    def _numbers(self, flow: tuple[bytes, bytes, bytes], flags: int) -> bytes:
        """A segment's: many follow an earlier SYN of the same ports, are another of it, or just not."""
        random = self.random
        known = self.syns.get(flow)
        if known and random.random() < 0.8:
            sequence = (random.choice(known) + random.choice(_STEPS)) % (1 << 32)
        else:
            sequence = random.choice((random.randrange(1 << 32), (1 << 32) - 1, (1 << 32) - 1000, 0))
        if flags & SYN:
            self.syns.setdefault(flow, deque(maxlen=3)).append(sequence)
        return sequence.to_bytes(4, "big") + random.choice((random.randbytes(4), b"\xff" * 4, bytes(4)))

    def _corner(self, destination: bytes, port: int) -> int:
        """A checksum about which arithmetic may stumble: one next to a carry, or that NAT to some backend makes 0."""
        server = self.random.choice(self.backends)
        if self.random.random() < 0.3 or len(server.address) != len(destination):
            return self.random.choice((1, 0xFEFF, 0xFF00, 0xFFFE))
        after = server.address + (server.port or port).to_bytes(2, "big")
        return (ones(after) - ones(destination + port.to_bytes(2, "big"))) % 65535

    def _packet(
        self, side: str, version: int, source: bytes, destination: bytes, protocol: int, body: bytes
    ) -> tuple[str, bytes]:
        """In IP and Ethernet, sometimes with options, extension headers and tags, and sometimes cut into fragments."""
        random = self.random
        link = self._link(side, version)
        hops = 64 if random.random() < 0.9 else random.choice((255, 2, 1, 0))
        tos = random.choice((0, 0, 0xB8, 0x03, random.randrange(256)))
        if random.random() < 0.08:
            return self._cut(side, link, version, source, destination, protocol, body, hops, tos)
        chain, first = self._chain(protocol) if version == 6 and random.random() < 0.15 else (b"", protocol)
        options = b"\x94\x04\0\0" * random.randint(1, 10) if version == 4 and random.random() < 0.08 else b""
        if version == 4:
            flags = random.choice((0, 0x4000, 0x4000, 0x8000))
            ident = random.randrange(4)
            if random.random() < 0.04:  # a header checksum next to a carry
                plain = _ipv4(source, destination, protocol, hops, tos, flags, 0, options, b"")
                total = (20 + len(options) + len(body)).to_bytes(2, "big")
                check = check_of(plain[:2], total, plain[4:10], plain[12:])
                ident = (check - random.choice((0xFEFF, 0xFF00, 0xFFFE, 1))) % 65535
            frame = link + _ipv4(source, destination, protocol, hops, tos, flags, ident, options, body)
        else:
            frame = link + _ipv6(source, destination, first, hops, tos, random.randrange(1 << 20), chain + body)
        if random.random() < 0.1:
            frame += random.randbytes(random.randrange(1, 48))
        return side, frame

    def _link(self, side: str, version: int) -> bytes:
        random = self.random
        destination = _OWN_MACS[side] if random.random() < 0.96 else random.choice((*_MANY, *_MACS))
        macs = destination + random.choice(_MACS)
        tags = b""
        r = random.random()
        if r < 0.15:
            count = 1 if r < 0.09 else 2 if r < 0.14 else 3
            tags = b"".join(random.choice(_TAGS) + random.choice(_TCIS) for _ in range(count))
        return macs + tags + (b"\x08\x00" if version == 4 else b"\x86\xdd")

    def _chain(self, protocol: int) -> tuple[bytes, int]:
        """Extension headers in front of the transport, and the type of the first."""
        random = self.random
        kinds = [random.choice((HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT)) for _ in range(random.randint(1, 7))]
        data = b""
        for kind, following in zip(kinds, [*kinds[1:], protocol], strict=True):
            if kind == FRAGMENT:
                data += bytes((following, 0, 0, random.choice((0, 0, 1)))) + random.choice((b"\0\0\0\7", b"\0\0\0\x08"))
            else:
                length = random.choice((0, 0, 1, 2))
                data += bytes((following, length, 1, 4 + 8 * length)) + bytes(4 + 8 * length)
        return data, kinds[0]

    def _cut(
        self,
        side: str,
        link: bytes,
        version: int,
        source: bytes,
        destination: bytes,
        protocol: int,
        body: bytes,
        hops: int,
        tos: int,
    ) -> tuple[str, bytes]:
        """The first fragment, mostly; the others come later, in any order, some twice, some over others."""
        random = self.random
        ident = random.randrange(3)
        size = random.choice((8, 16, 24, 40, 800))
        pieces = []
        for start in range(0, min(max(len(body), 1), 6 * size), size):
            at = max(0, start - random.choice((0, 0, 0, 8))) if start else 0
            more = start + size < len(body) or random.random() < 0.05
            piece = body[at : start + size]
            if version == 4:
                flags = (0x2000 if more else 0) | at // 8
                pieces.append(link + _ipv4(source, destination, protocol, hops, tos, flags, ident, b"", piece))
            else:
                head = bytes((protocol, 0)) + (at | more).to_bytes(2, "big") + ident.to_bytes(4, "big")
                chain, first = self._chain(FRAGMENT) if random.random() < 0.1 else (b"", FRAGMENT)
                pieces.append(link + _ipv6(source, destination, first, hops, tos, 0, chain + head + piece))
        if random.random() < 0.2:
            random.shuffle(pieces)
        self.cut.extend((side, piece) for piece in pieces[1:])
        return side, pieces[0]

    # What others send about what was sent.

    def _next(self, side: str, frame: bytes) -> tuple[str, bytes]:
        """Another packet of the same flow."""
        p = read(frame)
        if p is None or p.broken or p.fragment or p.protocol not in (TCP, UDP) or p.size < 8:
            return side, frame
        ports = number(frame, p.start), number(frame, p.start + 2)
        body = self._transport(p.source, p.destination, *ports, p.protocol)
        return self._packet(side, p.version, p.source, p.destination, p.protocol, body)

    def _answer(self, side: str, frame: bytes) -> tuple[str, bytes]:
        """The other way, from whoever got it."""
        p = read(frame)
        if p is None or p.broken or p.fragment:
            return side, frame
        if p.protocol in (TCP, UDP) and p.size >= 8:
            ports = number(frame, p.start + 2), number(frame, p.start)
            return self._back(p.version, p.destination, p.source, ports, p.protocol)
        return side, frame

    def _back(
        self, version: int, source: bytes, destination: bytes, ports: tuple[int, int], protocol: int
    ) -> tuple[str, bytes]:
        body = self._transport(source, destination, *ports, protocol)
        return self._packet("back", version, source, destination, protocol, body)

    def _error(self, side: str, frame: bytes, about_answer: bool) -> tuple[str, bytes]:
        """An ICMP error about the frame, or about its answer; from the addressee or from a router."""
        random = self.random
        p = read(frame)
        if p is None or len(frame) < p.at + 20:
            return side, frame
        packet = frame[p.at : p.at + p.length]
        source, destination = p.destination, p.source
        if about_answer and not p.broken and not p.fragment and p.protocol in (TCP, UDP) and p.size >= 8:
            ports = number(frame, p.start + 2), number(frame, p.start)
            answer = self._transport(p.destination, p.source, *ports, p.protocol)
            source, destination = p.source, p.destination
            if p.version == 4:
                packet = _ipv4(destination, source, p.protocol, 60, 0, 0x4000, 0, b"", answer)
            else:
                packet = _ipv6(destination, source, p.protocol, 60, 0, 0, answer)
        if random.random() < 0.3:
            source = random.choice(self.clients[p.version])
        if random.random() < 0.05:
            destination = random.choice(self.odd[p.version])
        head = 20 if p.version == 4 else 40
        quoted = packet[: random.choice((head + 8, head + 8, head + 17, head + 18, head + 20, 500, 1400, head + 7, 12))]
        protocol = ICMP if p.version == 4 else ICMPV6
        kinds = (3, 3, 3, 4, 11, 12, 5, 13) if p.version == 4 else (1, 2, 2, 3, 4, 5, 127)
        kind, code = random.choice(kinds), random.choice((0, 1, 3, 4))
        if p.source in self.arena.gateway.tunnel_sources.values() and random.random() < 0.5:
            kind, code = (3, 4) if p.version == 4 else (2, 0)
        rest = random.choice((bytes(4), b"\0\0\x05\x14", b"\xff" * 4, random.randrange(500, 1500).to_bytes(4, "big")))
        body = bytes((kind, code, 0, 0)) + rest + quoted
        above = pseudo(source, destination, protocol, len(body)) if p.version == 6 else b""
        body = body[:2] + check_of(above, body).to_bytes(2, "big") + body[4:]
        return self._packet(side, p.version, source, destination, protocol, body)

    # Damage.

    def _damage(self, frame: bytes) -> bytes:
        random = self.random
        kind = random.randrange(9)
        if len(frame) < 40:
            kind = 0
        data = bytearray(frame)
        at = 14
        while at < len(data) - 4 and bytes(data[at - 2 : at]) in _TAGS:
            at += 4
        if kind <= 1:
            del data[random.randrange(14, len(data) + 1) :]
        elif kind == 2:
            for _ in range(random.randint(1, 3)):
                data[random.randrange(min(len(data), at + 64))] = random.choice((0, 255, random.randrange(256)))
        elif kind == 3:
            place = random.randrange(min(len(data), at + 64))
            data[place] ^= 1 << random.randrange(8)
        elif kind == 4:  # lengths that lie: of IP, UDP, options, headers
            place = at + random.choice((2, 4, 24, 44, 41, 49))
            length = random.choice((*_INTERESTING, len(data) - at, len(data) - at + 1, len(data) - at - 1))
            data[place : place + 2] = length.to_bytes(2, "big")
        elif kind == 5:
            data[at] = random.choice((data[at] & 0xF0 | random.randrange(16), random.randrange(256)))
            if random.random() < 0.5:
                _mend(data, at)
        elif kind == 6 and data[at] >> 4 == 4:
            data[at + 6 : at + 8] = random.choice((0x2000, 1, 0x2001, 0x1FFF, 0x3FFF, 0x6000)).to_bytes(2, "big")
            _mend(data, at)
        elif kind == 7:
            place = random.randrange(at, len(data))
            data[place:place] = random.randbytes(random.choice((1, 2, 4, 8, 40)))
        else:
            place = random.randrange(at, len(data))
            del data[place : place + random.choice((1, 2, 4, 8))]
        return bytes(data)


def _mend(data: bytearray, at: int) -> None:
    """The IPv4 checksum, so that the damage is all that is wrong."""
    header = (data[at] & 15) * 4
    if header >= 20 and len(data) >= at + header:
        data[at + 10 : at + 12] = bytes(2)
        data[at + 10 : at + 12] = check_of(bytes(data[at : at + header])).to_bytes(2, "big")


def _ipv4(
    source: bytes,
    destination: bytes,
    protocol: int,
    hops: int,
    tos: int,
    flags: int,
    ident: int,
    options: bytes,
    body: bytes,
) -> bytes:
    head = bytes((0x45 + len(options) // 4, tos)) + (20 + len(options) + len(body)).to_bytes(2, "big")
    head += ident.to_bytes(2, "big") + flags.to_bytes(2, "big") + bytes((hops, protocol))
    check = check_of(head, source, destination, options).to_bytes(2, "big")
    return head + check + source + destination + options + body


def _ipv6(source: bytes, destination: bytes, first: int, hops: int, tos: int, label: int, body: bytes) -> bytes:
    head = (6 << 28 | tos << 20 | label).to_bytes(4, "big") + len(body).to_bytes(2, "big") + bytes((first, hops))
    return head + source + destination + body
