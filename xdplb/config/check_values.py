"""The values of a health check in the file: text or numbers in, values of the model out, or a ValueError for people."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from xdplb.config.values import HOST_NAME, did_you_mean, shown, text_of, told
from xdplb.model import CheckType, Rcode, TlsVersion

MAX_SEND = 1200
"""Bytes of a datagram: what fits into any path without fragments."""
_STATUS = re.compile(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?")
_UNSENDABLE = re.compile(r"[^!-~]")
_DNS_LABEL = re.compile(r"[!-~]{1,63}")
_HTTP_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


def parse_check_path(value: object) -> str:
    """It goes out as it is, so it must be able to."""
    text = text_of(value, "/healthz")
    if not text.startswith("/"):
        raise ValueError(f"{shown(text)} is not a path; it begins with / and has no spaces")
    if unsendable := _UNSENDABLE.search(text):
        what = "a blank" if unsendable[0] == " " else f"the character {unsendable[0]!r}"
        code = "".join(f"%{byte:02X}" for byte in unsendable[0].encode("utf-8", "surrogatepass"))
        raise ValueError(f"{shown(text)} has {what}, which no request can have; write {code}")
    return text


def parse_check_host(value: object) -> str:
    text = text_of(value, "example.org")
    if not _HTTP_HOST.fullmatch(text):
        raise ValueError(f"{shown(text)} cannot stand in a Host header; write example.org or example.org:8080")
    return text


def _status_codes(value: object) -> tuple[tuple[int, int], ...]:
    """Inclusive ranges of HTTP status codes: `200`, `200-399`, `200,301-302`."""
    ranges = []
    for part in str(value).split(",") if isinstance(value, int | str) else [""]:
        match = _STATUS.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"{shown(value)} does not name status codes; write 200, 200-399 or 200,301-302")
        ranges.append((first, last))
    return tuple(ranges)


def _rcodes(value: object) -> tuple[Rcode, ...]:
    """`NOERROR`, or `NOERROR,NXDOMAIN`."""
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else [""]
    for word in words:
        if word not in list(Rcode):
            guess = did_you_mean(word.upper(), map(str, Rcode))
            raise ValueError(f"{shown(value)} does not name response codes{guess or '; write NOERROR,NXDOMAIN'}")
    return tuple(map(Rcode, words))


class Answer(NamedTuple):
    """What a udp check wants to hear: these bytes, or anything where that is None, or nothing at all."""

    wanted: bytes | None
    silence_is_fine: bool


def _answer(value: object) -> Answer:
    """`answer`, `no-refusal`, or `{text: pong}`, `{hex: 00ff}`."""
    if value in ("answer", "no-refusal"):
        return Answer(None, value == "no-refusal")
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is no answer; write answer, no-refusal, {{text: pong}} or {{hex: 00ff}}")
    wanted = parse_bytes(value)
    if not wanted:
        raise ValueError("every answer contains no bytes at all; write answer")
    return Answer(wanted, False)


Expected = tuple[tuple[int, int], ...] | tuple[Rcode, ...] | Answer


class Expectation(NamedTuple):
    """`expect` as it was written: what it may be depends on the type of the check, which may stand elsewhere."""

    written: object

    def read(self, kind: CheckType) -> Expected:
        """ValueError where it is nothing for this type."""
        return _EXPECTED[kind](self.written)


_EXPECTED: dict[CheckType, Callable[[object], Expected]] = {
    CheckType.HTTP: _status_codes,
    CheckType.HTTPS: _status_codes,
    CheckType.DNS: _rcodes,
    CheckType.UDP: _answer,
}


class ExpectationOf(NamedTuple):
    """`expect` as it was written beside this type."""

    kind: object
    written: object


def parse_expect(value: object) -> Expectation:
    """ValueError where it is nothing for the type beside it, or for any type."""
    if isinstance(value, ExpectationOf):
        expectation = Expectation(value.written)
        if value.kind in _EXPECTED:
            expectation.read(CheckType(str(value.kind)))
            return expectation
        value = value.written
    expectation, reasons = Expectation(value), []
    for kind in (CheckType.HTTP, CheckType.DNS, CheckType.UDP):
        try:
            expectation.read(kind)
            return expectation
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[2 if isinstance(value, dict) else 0])


def parse_bytes(value: object) -> bytes:
    """`hello`, `{text: hello}`, or `{hex: 00ff}`."""
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in ("text", "hex"):
        raise ValueError(f"must be text, {{text: hello}} or {{hex: 00ff}}, but is {told(value)}")
    ((form, written),) = value.items()
    if not isinstance(written, str):
        raise ValueError(f"{form} must be text, but is {told(written)}; put it in quotes")
    if form == "text":
        return written.encode()
    try:
        return bytes.fromhex(written)
    except ValueError:
        raise ValueError(f"{shown(written)} is not hexadecimal; write two digits for each byte") from None


def parse_send(value: object) -> bytes:
    data = parse_bytes(value)
    if len(data) > MAX_SEND:
        raise ValueError(f"{len(data)} bytes are too many; {MAX_SEND} are possible")
    return data


def parse_dns_name(value: object) -> str:
    text = text_of(value, "example.org")
    labels = text.removesuffix(".").split(".")
    if text != "." and (not all(map(_DNS_LABEL.fullmatch, labels)) or len(text) > 253):
        raise ValueError(f"{shown(text)} is not a DNS name; write example.org, in ASCII")
    return text


def parse_command(value: object) -> tuple[str, ...]:
    """A program and its arguments."""
    example = "write [/usr/local/bin/check, --fast]"
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be a list of a program and its arguments, but is {told(value)}; {example}")
    for word in value:
        if not isinstance(word, str):
            raise ValueError(f"must be a list of texts, but has {told(word)}; put it in quotes")
        if "\0" in word:
            raise ValueError("no argument can have a byte of 0")
    if not value[0].startswith("/"):
        raise ValueError(f"{shown(value[0])} is not the whole path of a program; {example}. There is no shell")
    return tuple(value)


def parse_tls_version(value: object) -> TlsVersion:
    """YAML reads 1.2 as a number."""
    text = str(value)
    if isinstance(value, bool) or text not in list(TlsVersion):
        raise ValueError(f"{shown(value)} is not a version of TLS; available: {', '.join(TlsVersion)}")
    return TlsVersion(text)


def parse_server_name(value: object) -> str:
    text = text_of(value, "example.org")
    if not HOST_NAME.fullmatch(text) or any(len(label) > 63 for label in text.split(".")):
        raise ValueError(f"{shown(text)} cannot be a name in TLS; write example.org")
    return text


class Authorities(NamedTuple):
    """A file of certificates, and what is in it."""

    path: str
    pem: str


def parse_authorities(value: object) -> Authorities:
    """The file is read now: what is wrong with it is a mistake of the configuration."""
    text = text_of(value, "/etc/ssl/certs/example.pem")
    if not text.startswith("/"):
        raise ValueError(f"{shown(text)} is not the whole path of a file")
    try:
        pem = Path(text).read_text(encoding="ascii")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except OSError as error:
        if isinstance(error, ssl.SSLError):
            raise ValueError(f"{text} holds no certificates in PEM form") from None
        raise ValueError(f"{text} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except ValueError:
        raise ValueError(f"{text} holds no certificates in PEM form") from None
    return Authorities(text, pem)
