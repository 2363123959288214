"""The values of the configuration file: text or numbers in, values of the model out, or a ValueError for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from ipaddress import ip_address, ip_interface, ip_network
from typing import NamedTuple

from xdplb.abi import MAX_SOURCES
from xdplb.model import Address, Affinity, Listen, Network, Protocol
from xdplb.paths import is_interface_name

Settings = Mapping[str, object]

MAX_IDLE_S = 2040
DEFAULT_CONTROL_LOSS_S = 30.0

DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)")
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,62}")
HOST_NAME = re.compile(r"(?:[A-Za-z0-9_-]+\.)*[A-Za-z][A-Za-z0-9_-]*\.?")
_HOST_PORT = re.compile(r"\[(?P<v6>[^]]*)\](?::(?P<v6port>.*))?|(?P<v4>[^][:]*)(?::(?P<v4port>[^:]*))?")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


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


def text_of(value: object, example: str) -> str:
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
        if HOST_NAME.fullmatch(text):
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
    text = text_of(value, "203.0.113.10:80/tcp")
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
    text = text_of(value, "10.99.0.0/16")
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
    text = text_of(value, "10.0.0.100")
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
    text = text_of(value, "web-1")
    if not NAME.fullmatch(text):
        allowed = "up to 63 letters, digits and . _ : - of ASCII, a letter or digit first"
        raise ValueError(f"{shown(text)} is not a name; a name is {allowed}")
    return text


def parse_interface(value: object) -> str:
    text = text_of(value, "eth0")
    if not is_interface_name(text):
        raise ValueError(f"{shown(text)} cannot be the name of an interface")
    return text


def parse_hash_key(value: object) -> str:
    text = text_of(value, "a-long-random-secret")
    if text and len(text) < 16:
        raise ValueError(f"{len(text)} characters are too few for a secret; use 16 or more, or leave it out")
    return text


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
