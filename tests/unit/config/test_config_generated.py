"""Configuration files that are made up: values are read as they were written, or mistakes are told."""

from __future__ import annotations

from textwrap import dedent

import pytest
import yaml
from configuring import mistakes
from hypothesis import given
from hypothesis import strategies as st

from xdplb.config import read as configuration
from xdplb.config import values
from xdplb.errors import ConfigError
from xdplb.model import Listen, Protocol


@given(st.integers(1, 10**9 - 1), st.sampled_from([("ms", 0.001), ("s", 1), ("m", 60), ("h", 3600)]))
def test_durations_are_seconds(number: int, unit: tuple[str, float]) -> None:
    assert values.parse_duration(f"{number}{unit[0]}") == pytest.approx(number * unit[1], rel=1e-12)


@given(st.integers(0, 86_400_000))
def test_durations_in_seconds_and_milliseconds_are_the_same_to_the_bit(milliseconds: int) -> None:
    seconds = f"{milliseconds // 1000}.{milliseconds % 1000:03}s"
    assert values.parse_duration(seconds) == values.parse_duration(f"{milliseconds}ms") == milliseconds / 1000


PORTS = st.one_of(
    st.just((0, 65535)),
    st.integers(1, 65535).map(lambda port: (port, port)),
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda pair: (min(pair), max(pair))),
)
ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).filter(
    lambda a: not (a.is_multicast or a.is_unspecified or a.is_loopback or getattr(a, "ipv4_mapped", None))
)
LISTENS = st.tuples(ADDRESSES, PORTS, st.sampled_from(Protocol)).map(lambda t: Listen(t[0], t[1][0], t[1][1], t[2]))


@given(LISTENS)
def test_listen_reads_what_it_writes(listen: Listen) -> None:
    assert values.parse_listen(str(listen)) == listen


VALID = [
    {"name": "a", "listen": "1.1.1.1:80", "backends": [{"address": "10.0.0.1"}, {"address": "10.0.0.2:81"}]},
    {"name": "b", "listen": "1.1.1.1:80/udp", "check": "none", "backends": [{"address": "10.0.0.1", "weight": 9}]},
    {"name": "c", "listen": "1.1.1.1:70-90", "forward": "dsr", "backends": [{"address": "10.0.0.1"}]},
    {"name": "d", "listen": "1.1.1.1:0", "check": {"port": 1}, "backends": [{"address": "10.0.0.1"}]},
    {"name": "e", "listen": "[fd00::9]:443", "forward": "gue", "gue_port": 9, "backends": [{"address": "10.0.0.1"}]},
    {"name": "f", "listen": "1.1.1.2:80", "forward": "ipip", "backends": [{"address": "fd00::1", "name": "x"}]},
    {"name": "g", "listen": "1.1.1.2:81", "on_all_down": "fail-open", "backends": [{"address": "10.0.0.1"}]},
    {
        "name": "h",
        "listen": "1.1.1.2:82",
        "check": {"type": "https", "path": "/x", "expect": 204, "timeout": "9s"},
        "backends": [{"address": "10.0.0.1", "weight": 0}, {"address": "10.0.0.2", "backup": True}],
    },
]


@given(st.permutations(VALID), st.integers(0, len(VALID)), st.booleans())
def test_any_subset_of_valid_services_is_valid(shuffled: list[dict[str, object]], count: int, flow: bool) -> None:
    chosen = shuffled[:count]
    text = yaml.safe_dump({"services": chosen}, default_flow_style=flow, sort_keys=False)
    assert [one.name for one in configuration.parse(text, "FILE").services] == [one["name"] for one in chosen]


@given(
    st.from_regex(r"[a-z_]{1,12}", fullmatch=True).filter(lambda key: key not in {"on", "no", "off", "yes", "y", "n"}),
    st.sampled_from(
        [
            ("interfaces", "", ""),
            ("fall", "    ", "defaults.check"),
            ("listen", "    ", "services[0]"),
            ("new_flows", "      ", "services[0].limits"),
            ("address", "        ", "services[0].backends[1]"),
        ]
    ),
)
def test_an_unknown_key_is_always_told_with_its_line(key: str, place: tuple[str, str, str]) -> None:
    after, margin, path = place
    lines = dedent(
        """\
        interfaces: [eth0]
        defaults:
          check:
            fall: 3
        services:
          - name: web
            listen: 203.0.113.10:80
            limits:
              new_flows: 0
            backends:
              - name: a
                weight: 1
                address: 10.0.0.11
              - name: b
                weight: 1
                address: 10.0.0.12
        """
    ).splitlines()
    known = set("".join(lines).replace(":", " ").split()) | KEYS_OF_THE_CONTRACT
    if key in known:
        return
    index = max(number for number, line in enumerate(lines, 1) if line.strip(" -").startswith(f"{after}:"))
    lines.insert(index, f"{margin}{key}: 1")
    (found,) = mistakes("\n".join(lines))
    assert found.startswith(f"FILE:{index + 1}: {path}{': ' if path else ''}unknown key {key!r}")


KEYS_OF_THE_CONTRACT = {
    key
    for definition in [configuration.schema(), *configuration.schema()["$defs"].values()]  # type: ignore[attr-defined]
    for part in [definition, *definition.get("anyOf", [])]
    for key in part.get("properties", {})
}

WORDS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    st.text(max_size=5),
    st.sampled_from(["http", "client", "1s", "10.0.0.1", "10.0.0.1:80", "fd00::1", "0.0.0.0/0", "a", "nat", "flow"]),
)


def shaped(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    keys = st.sampled_from(sorted(KEYS_OF_THE_CONTRACT))
    return st.lists(values, max_size=3) | st.dictionaries(keys, values, max_size=8)


@given(st.dictionaries(st.sampled_from(sorted(KEYS_OF_THE_CONTRACT)), st.recursive(WORDS, shaped), max_size=6))
def test_nonsense_with_the_right_words_gets_plain_answers(data: dict[str, object]) -> None:
    text = yaml.safe_dump({"services": [data, data], "defaults": data, **data})
    try:
        configuration.parse(text, "FILE")
    except ConfigError as error:
        for mistake in error.mistakes:
            assert mistake.startswith("FILE:") and "\n" not in mistake
            assert not any(jargon in mistake for jargon in ("Input", "Value error", "valid ", "_type", "None", "dict"))


@given(st.text(max_size=40))
def test_any_text_is_a_configuration_or_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigError):
        configuration.parse(text, "FILE")
    with pytest.raises(ConfigError):
        configuration.from_command_line(text, [text], [text])
