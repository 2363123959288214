"""A dns check: one question over UDP; the response code decides (RFC 1035 section 4, RFC 6895 section 2.3).

L7OK/NOERROR      the response code is among those that `expect` names
L7STS/SERVFAIL    it is not
L7RSP             what came back is no answer to the question
L7TOUT            nothing came back                       L4CON    ICMP says that the port is closed
"""

from __future__ import annotations

import os
import struct

from xdplb.checks.attempt import Attempt, CheckFailed, Steps, Verdict
from xdplb.checks.endpoint import Endpoint, Layer
from xdplb.checks.udp import Exchange
from xdplb.model import DnsRecord, Rcode

_TYPES = {
    DnsRecord.A: 1,
    DnsRecord.NS: 2,
    DnsRecord.CNAME: 5,
    DnsRecord.SOA: 6,
    DnsRecord.PTR: 12,
    DnsRecord.MX: 15,
    DnsRecord.TXT: 16,
    DnsRecord.AAAA: 28,
    DnsRecord.SRV: 33,
}
_RCODES = dict(enumerate(Rcode))
_HEADER = struct.Struct("!HHHHHH")
_RECURSION_DESIRED, _IS_RESPONSE = 0x0100, 0x8000
_INTERNET = 1


class DnsCheck:
    def __init__(self, endpoint: Endpoint) -> None:
        self._exchange = Exchange(endpoint)
        self._question = question(endpoint.check.name, endpoint.check.record)
        self._expect = endpoint.check.rcodes

    def __call__(self, attempt: Attempt) -> Steps:
        attempt.layer = Layer.L7
        number = os.urandom(2)
        with self._exchange.opened(attempt) as connection:
            header = number + _HEADER.pack(0, _RECURSION_DESIRED, 1, 0, 0, 0)[2:]
            yield from self._exchange.send(connection, header + self._question)
            while True:
                data = yield from self._exchange.receive(connection)
                if data[:2] == number:
                    break  # else it is nobody's, or somebody guesses: the answer may still come
        return self._judge(data)

    def _judge(self, data: bytes) -> Verdict:
        if len(data) < _HEADER.size:
            raise CheckFailed(f"answer of {len(data)} bytes is no DNS message")
        _, flags, questions, *_ = _HEADER.unpack_from(data)
        if not flags & _IS_RESPONSE:
            raise CheckFailed("answer is a question")
        asked = data[_HEADER.size : _HEADER.size + len(self._question)]
        if questions and asked.lower() != self._question.lower():
            raise CheckFailed("answer is about another question")
        rcode = _RCODES.get(flags & 0xF)
        word = rcode.value if rcode else f"RCODE{flags & 0xF}"
        if rcode in self._expect:
            return Verdict(True, f"L7OK/{word}")
        return Verdict(False, f"L7STS/{word}", f"answered {word}")


def question(name: str, record: DnsRecord) -> bytes:
    """As in a message. ValueError for what cannot be a name."""
    encoded = b""
    for label in name.rstrip(".").split(".") if name.rstrip(".") else ():
        raw = label.encode("ascii")
        if not 1 <= len(raw) <= 63:
            raise ValueError(f"{name!r} is not a DNS name")
        encoded += bytes([len(raw)]) + raw
    return encoded + b"\x00" + struct.pack("!HH", _TYPES[record], _INTERNET)
