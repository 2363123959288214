"""The values of the configuration file: text or numbers in, values of the model out, or a ValueError for people."""

from __future__ import annotations

import difflib
import re
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import NamedTuple

from xdplb.abi import MAX_SOURCES
from xdplb.model import Address, Affinity, CheckType, Listen, Network, Protocol, Rcode, TlsVersion
from xdplb.paths import is_interface_name

Settings = Mapping[str, object]

MAX_IDLE_S = 2040
MAX_SEND = 1200
"""Bytes of a datagram: what fits into any path without fragments."""
DEFAULT_CONTROL_LOSS_S = 30.0

DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)")
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,62}")
_HOST_NAME = re.compile(r"(?:[A-Za-z0-9_-]+\.)*[A-Za-z][A-Za-z0-9_-]*\.?")
_HOST_PORT = re.compile(r"\[(?P<v6>[^]]*)\](?::(?P<v6port>.*))?|(?P<v4>[^][:]*)(?::(?P<v4port>[^:]*))?")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_STATUS = re.compile(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?")
_UNSENDABLE = re.compile(r"[^!-~]")
_DNS_LABEL = re.compile(r"[!-~]{1,63}")
_HTTP_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


def shown(value: object) -> str:
    """A value of the file as part of a one-line sentence."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        shown = value if re.fullmatch(r"[^\s'\"]+", value) and value.isprintable() else repr(value)
        return shown if len(shown) <= 80 else f"{shown[:77]}..."
    if isinstance(value, int) and value.bit_length() > 64:
        return "a very large number"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)


def told(value: object) -> str:
    """The same after "but is", where text and number must not look alike."""
    return f"the text {shown(value)}" if isinstance(value, str) else shown(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _text(value: object, example: str) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"must be text like {example}, but is {told(value)}; put it in quotes")


def parse_duration(value: object) -> float:
    """Seconds. `2s`, `500ms`, `1.5s`, `2m`, `1h`; only 0 needs no unit. Raises ValueError."""
    if value == 0 and not isinstance(value, bool):
        return 0.0
    match = DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        if isinstance(value, int | float | str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", str(value)):
            raise ValueError(f"{value} has no unit; write {value}s for seconds (units: ms, s, m, h)")
        raise ValueError(f"{shown(value)} is not a duration like 2s, 500ms, 1.5s or 5m")
    number, unit = match.groups()
    return float(number) * _UNIT_MS[unit] / 1000


def parse_interval(value: object) -> float:
    seconds = parse_duration(value)
    if not 0.001 <= seconds <= 86_400:
        raise ValueError(f"{shown(value)} is too {'short' if seconds < 1 else 'long'}; from 1ms to 24h is possible")
    return seconds


def parse_host_interval(value: object) -> float:
    seconds = parse_duration(value)
    if not 1 <= seconds <= 3600:
        raise ValueError(f"must be from 1s to 1h, but is {value}")
    return seconds


def choice(what: str, available: type[StrEnum], later: Sequence[str]) -> Callable[[object], StrEnum]:
    """A parser of words out of `available`; `later` are words of the contract whose feature does not exist yet."""
    words = {member.value: member for member in available}
    article = "an" if what[0] in "aeiou" else "a"
    ending = f"available: {', '.join(words)}"

    def parse(value: object) -> StrEnum:
        if isinstance(value, str) and value in words:
            return words[value]
        if value in later:
            raise ValueError(f"{what} {value!r} is not available yet; {ending}")
        guess = did_you_mean(value, words) if isinstance(value, str) else ""
        raise ValueError(f"{shown(value)} is not {article} {what}{guess or f'; {ending}'}")

    return parse


def _parse_address(text: str) -> Address:
    """An address a service or a backend may have."""
    try:
        address = ip_address(text)
    except ValueError:
        if _HOST_NAME.fullmatch(text):
            raise ValueError(f"{shown(text)} is a name; only IP addresses are taken, names are not looked up") from None
        raise ValueError(f"{shown(text)} is not an IP address") from None
    if "%" in text:
        raise ValueError(f"{text} has a zone; leave out what begins with %")
    if address.version == 6 and address.ipv4_mapped:
        raise ValueError(f"{text} never appears in a packet; write {address.ipv4_mapped}")
    for kind in ("multicast", "unspecified", "loopback"):
        if getattr(address, f"is_{kind}"):
            raise ValueError(
                f"{text} is {'an' if kind[0] == 'u' else 'a'} {kind} address; packets for it cannot be balanced"
            )
    return address


def _split_port(text: str) -> tuple[Address, str | None]:
    """`10.0.0.1`, `10.0.0.1:80`, `[2001:db8::1]`, `[2001:db8::1]:80` or a bare IPv6 address."""
    match = _HOST_PORT.fullmatch(text)
    if match is None or match["v6"] is None:
        return _parse_address(match["v4"] if match else text), match["v4port"] if match else None
    address = _parse_address(match["v6"])
    if address.version == 4:
        raise ValueError(f"{shown(text)}: brackets are for IPv6 addresses only")
    return address, match["v6port"]


def _parse_ports(text: str) -> tuple[int, int]:
    """The first and the last port of `80`, of `8000-8099`, or of `0`, which means all."""
    match = _PORTS.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a port, nor a range like 8000-8099")
    first, last = int(match[1]), int(match[2] or match[1])
    if max(first, last) > 65535:
        raise ValueError(f"port {max(first, last)} is out of range; ports end at 65535")
    if match[2] is None:
        return (first, last) if first else (0, 65535)
    if first == 0:
        raise ValueError("a port range begins at 1 or higher; write port 0 alone for all ports")
    if first > last:
        raise ValueError(f"the port range {text} runs backwards; write {last}-{first}")
    return first, last


def parse_listen(value: object) -> Listen:
    """`203.0.113.10:80/tcp`, `[2001:db8::10]:8000-8099/udp`; tcp where no protocol is given. Raises ValueError."""
    text = _text(value, "203.0.113.10:80/tcp")
    where, slash, protocol = text.partition("/")
    address, ports = _split_port(where)
    if ports is None:
        host = f"[{address}]" if address.version == 6 else address
        raise ValueError(f"{where} has no port; write {host}:80 (port 0 means all ports)")
    if slash and protocol not in list(Protocol):
        raise ValueError(f"{shown(protocol)} is not a protocol; available: {', '.join(Protocol)}")
    first, last = _parse_ports(ports)
    return Listen(address, first, last, Protocol(protocol) if slash else Protocol.TCP)


class Endpoint(NamedTuple):
    """A backend's address; `text` is how it was written."""

    address: Address
    port: int | None
    text: str


def parse_endpoint(value: object) -> Endpoint:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not an IP address")
    address, port = _split_port(value)
    if port is None:
        return Endpoint(address, None, value)
    first, last = _parse_ports(port)
    if first != last:
        raise ValueError(f"a backend has one port, from 1 to 65535, not {port}")
    return Endpoint(address, first, value)


def _parse_network(value: object) -> Network:
    text = _text(value, "10.99.0.0/16")
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a network like 10.99.0.0/16") from None
    if ip_interface(text).ip != network.network_address:
        raise ValueError(f"{text} is not a whole network, did you mean {network}?")
    return network


def parse_tunnel_prefix(value: object) -> Network:
    network = _parse_network(value)
    shortest, longest = (8, 32) if network.version == 4 else (64, 128)
    if network.prefixlen < shortest:
        raise ValueError(
            f"{network} is too large; an IPv{network.version} prefix of /{shortest} to /{longest} is possible"
        )
    return network


def parse_sources(value: object) -> list[Address]:
    """`10.0.0.100`, `10.0.0.100-10.0.0.103`, or `10.0.1.0/28`, without its both ends; likewise of IPv6."""
    text = _text(value, "10.0.0.100")
    first, dash, last = text.partition("-")
    if dash:
        ends = _parse_address(first), _parse_address(last)
        if ends[0].version != ends[1].version or int(ends[0]) > int(ends[1]):
            raise ValueError(f"{text} is not a range like 10.0.0.100-10.0.0.103")
        size = int(ends[1]) - int(ends[0]) + 1
        if size > MAX_SOURCES:
            raise ValueError(f"{text} has {size} addresses; {MAX_SOURCES} are possible")
        return [ends[0] + offset for offset in range(size)]
    if "/" in text:
        network = _parse_network(text)
        if network.num_addresses > 2 * MAX_SOURCES:
            raise ValueError(f"{text} has {network.num_addresses} addresses; {MAX_SOURCES} are possible")
        return list(network.hosts())
    return [_parse_address(text)]


def parse_name(value: object) -> str:
    text = _text(value, "web-1")
    if not NAME.fullmatch(text):
        allowed = "up to 63 letters, digits and . _ : - of ASCII, a letter or digit first"
        raise ValueError(f"{shown(text)} is not a name; a name is {allowed}")
    return text


def parse_interface(value: object) -> str:
    text = _text(value, "eth0")
    if not is_interface_name(text):
        raise ValueError(f"{shown(text)} cannot be the name of an interface")
    return text


def parse_hash_key(value: object) -> str:
    text = _text(value, "a-long-random-secret")
    if text and len(text) < 16:
        raise ValueError(f"{len(text)} characters are too few for a secret; use 16 or more, or leave it out")
    return text


def parse_check_path(value: object) -> str:
    """It goes out as it is, so it must be able to."""
    text = _text(value, "/healthz")
    if not text.startswith("/"):
        raise ValueError(f"{shown(text)} is not a path; it begins with / and has no spaces")
    if unsendable := _UNSENDABLE.search(text):
        what = "a blank" if unsendable[0] == " " else f"the character {unsendable[0]!r}"
        code = "".join(f"%{byte:02X}" for byte in unsendable[0].encode("utf-8", "surrogatepass"))
        raise ValueError(f"{shown(text)} has {what}, which no request can have; write {code}")
    return text


def parse_check_host(value: object) -> str:
    text = _text(value, "example.org")
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
    text = _text(value, "example.org")
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
    text = _text(value, "example.org")
    if not _HOST_NAME.fullmatch(text) or any(len(label) > 63 for label in text.split(".")):
        raise ValueError(f"{shown(text)} cannot be a name in TLS; write example.org")
    return text


class Authorities(NamedTuple):
    """A file of certificates, and what is in it."""

    path: str
    pem: str


def parse_authorities(value: object) -> Authorities:
    """The file is read now: what is wrong with it is a mistake of the configuration."""
    text = _text(value, "/etc/ssl/certs/example.pem")
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


class AffinityWord(StrEnum):
    FLOW = "flow"
    CLIENT = "client"


class ControlLoss(StrEnum):
    KEEP = "keep"
    PASS = "pass"


_affinity_word = choice("affinity", AffinityWord, ())
_control_loss_word = choice("on_control_loss policy", ControlLoss, ())


def _word_and_settings(value: object, parse: Callable[[object], StrEnum], known: Sequence[str]) -> tuple[str, Settings]:
    """A word, or a mapping of it to its settings; `known` are those of the last of the words, the others have none."""
    if not isinstance(value, dict) or len(value) != 1:
        return parse(value), {}
    word, settings = next(iter(value.items()))
    parsed = parse(word)
    if settings in (None, {}):
        return parsed, {}
    if parsed is not list(type(parsed))[-1]:
        raise ValueError(f"{parsed} has no settings")
    if not isinstance(settings, dict):
        raise ValueError(f"the settings of {parsed} must be a mapping, but are {told(settings)}")
    for key in settings:
        if key not in known:
            guess = did_you_mean(str(key), known) or f"; known: {', '.join(known)}"
            raise ValueError(f"unknown key {key!r}{guess}")
    return parsed, settings


def _setting_number(settings: Settings, key: str, default: int, most: int) -> int:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{key} must be a whole number from 1 to {most}, but is {told(value)}")
    return value


def parse_affinity(value: object) -> Affinity | None:
    """`flow`, `client`, or `client: {prefix4: 32, prefix6: 128, timeout: 5m}` as a mapping; None for `flow`."""
    word, settings = _word_and_settings(value, _affinity_word, ("prefix4", "prefix6", "timeout"))
    if word == AffinityWord.FLOW:
        return None
    default = Affinity()
    return Affinity(
        _setting_number(settings, "prefix4", default.prefix4, 32),
        _setting_number(settings, "prefix6", default.prefix6, 128),
        parse_idle(settings["timeout"]) if "timeout" in settings else default.timeout_s,
    )


def parse_control_loss(value: object) -> float | None:
    """`keep`, `pass`, or `pass: {after: 30s}` as a mapping; None for `keep`, else seconds."""
    word, settings = _word_and_settings(value, _control_loss_word, ("after",))
    if word == ControlLoss.KEEP:
        return None
    seconds = parse_duration(settings["after"]) if "after" in settings else DEFAULT_CONTROL_LOSS_S
    if not 3 <= seconds <= 86_400:
        raise ValueError(f"after must be from 3s to 24h, but is {settings['after']}")
    return seconds


def parse_slow_start(value: object) -> float:
    seconds = parse_duration(value)
    if seconds > 3600:
        raise ValueError(f"{shown(value)} is too long; up to 1h is possible")
    return seconds


def parse_idle(value: object) -> float:
    """The packet path counts idle times in seconds, nearly, and up to 34 minutes."""
    seconds = parse_duration(value)
    if not 1 <= seconds <= MAX_IDLE_S:
        raise ValueError(f"must be from 1s to {MAX_IDLE_S // 60}m, but is {value}")
    return seconds


def parse_allow(value: object) -> list[Network]:
    networks = _networks(value)
    if not networks or any(network.prefixlen for network in networks):
        raise ValueError("allow is not available yet; only everybody, [0.0.0.0/0], is possible")
    return networks


def parse_deny(value: object) -> list[Network]:
    networks = _networks(value)
    if networks:
        raise ValueError("deny is not available yet; only [] is possible")
    return networks


def _networks(value: object) -> list[Network]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list of networks, but is {told(value)}")
    return [_parse_network(item) for item in value]


def parse_limit(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"must be a whole number from 0, but is {told(value)}")
    if value:
        raise ValueError("limits are not available yet; only 0, none, is possible")
    return value
