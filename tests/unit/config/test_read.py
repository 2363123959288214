"""The configuration file: what it means. Files that are made up are in test_config_generated.py."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path

import pytest
import yaml
from configuring import mistakes, only, service

from xdplb.config import read as configuration
from xdplb.errors import ConfigError
from xdplb.model import (
    Affinity,
    Backend,
    Check,
    CheckType,
    Config,
    FlowCache,
    FlowMemory,
    Forward,
    HostUpkeep,
    Listen,
    OnAllDown,
    OnDown,
    Protocol,
    Scheduler,
    Service,
    Upkeep,
)

EXAMPLE = """\
interfaces: [eth0]                # names given to `xdplb up` win; a second one is the backend side
hash_key: ""                      # shared by the gateways of one cluster; drawn and kept where none is given
defaults:                         # anything a service may set, but name, listen and backends
  check: {type: tcp, interval: 2s, fast_interval: 500ms, timeout: 1s, rise: 2, fall: 3}
services:
  - name: web
    listen: 203.0.113.10:80/tcp   # also "[2001:db8::10]:443/udp"; port 0 or a range 8000-8099 for several ports
    forward: nat                  # nat | dsr | ipip | gue | full-nat
    scheduler: maglev             # maglev | source-hash | rr | wrr | lc | wlc | p2c
    affinity: flow                # flow | client        (client: {prefix4: 32, prefix6: 128, timeout: 5m} as a mapping)
    check: {type: http, path: /healthz, expect: 200-399, host: example.org}   # none | tcp | http | https | dns | udp
    slow_start: 0s
    on_down: rehash               # rehash | keep
    on_all_down: reject           # reject | fail-open
    allow: [0.0.0.0/0]
    deny: []
    limits: {new_flows_per_client: 0, packets_per_client: 0, new_flows: 0}    # a second; 0 = none
    backends:
      - {name: a, address: 10.0.0.11, weight: 10}          # port: the service's where none is given
      - {name: b, address: "10.0.0.12:8080", weight: 20}
      - {name: spare, address: 10.0.0.99, backup: true}
"""


def test_the_example_of_the_documentation() -> None:
    assert configuration.parse(EXAMPLE, "FILE") == Config(
        interfaces=("eth0",),
        services=(
            Service(
                name="web",
                listen=Listen(IPv4Address("203.0.113.10"), 80, 80, Protocol.TCP),
                forward=Forward.NAT,
                scheduler=Scheduler.MAGLEV,
                check=Check(CheckType.HTTP, 2.0, 0.5, 1.0, 2, 3, None, "/healthz", "example.org", ((200, 399),)),
                backends=(
                    Backend("a", IPv4Address("10.0.0.11"), None, weight=10),
                    Backend("b", IPv4Address("10.0.0.12"), 8080, weight=20),
                    Backend("spare", IPv4Address("10.0.0.99"), None, backup=True),
                ),
                on_all_down=OnAllDown.REJECT,
            ),
        ),
    )


def test_what_is_not_given_has_the_defaults_of_the_model() -> None:
    web = only(service())
    assert web.check == Check()
    assert (web.forward, web.scheduler, web.on_all_down, web.gue_port) == (
        Forward.NAT,
        Scheduler.MAGLEV,
        OnAllDown.REJECT,
        Service.__dataclass_fields__["gue_port"].default,
    )
    assert web.backends == (Backend("10.0.0.11", IPv4Address("10.0.0.11"), None),)


def test_a_service_wins_over_the_defaults_and_check_is_joined_key_by_key() -> None:
    text = "defaults: {forward: ipip, scheduler: source-hash, check: {type: http, path: /a, rise: 5}}\n"
    web = only(text + service("scheduler: maglev\ncheck: {path: /b, expect: '200,301-302'}"))
    assert (web.forward, web.scheduler) == (Forward.IPIP, Scheduler.MAGLEV)
    assert web.check == Check(CheckType.HTTP, path="/b", rise=5, expect=((200, 200), (301, 302)))
    assert only(text + service("check: none")).check == Check(CheckType.NONE, path="/a", rise=5)


def test_what_becomes_of_the_flows_of_a_backend_that_is_down_and_which_flows_are_remembered() -> None:
    web = only(service())
    assert (web.on_down, web.flows) == (OnDown.REHASH, FlowMemory.REMEMBER)
    web = only("defaults: {on_down: keep, flows: none}\n" + service("flows: remember"))
    assert (web.on_down, web.flows) == (OnDown.KEEP, FlowMemory.REMEMBER)


def test_the_flow_cache_is_the_models_where_nothing_is_said() -> None:
    assert configuration.parse(service(), "FILE").flow_cache == FlowCache()
    assert configuration.parse("flow_cache: {}\n" + service(), "FILE").flow_cache == FlowCache()
    text = "flow_cache: {capacity: 4096, window: 5m, established: 34m, closing: 1s, opening: 2500ms, datagram: 30s}\n"
    assert configuration.parse(text + service(), "FILE").flow_cache == FlowCache(4096, 300.0, 2040.0, 1.0, 2.5, 30.0)


def test_the_host_is_mended_where_nothing_is_said() -> None:
    assert configuration.parse(service(), "FILE").host == HostUpkeep()
    text = "host: {addresses: alarm, settings: alarm, interval: 30s}\n"
    assert configuration.parse(text + service(), "FILE").host == HostUpkeep(Upkeep.ALARM, Upkeep.ALARM, 30.0)


@pytest.mark.parametrize(
    ("listen", "settings", "found"),
    [
        ("203.0.113.10:53/udp", "", CheckType.NONE),
        ("203.0.113.10:53/udp", "check: {interval: 5s}", CheckType.NONE),
        ("203.0.113.10:0/udp", "", CheckType.NONE),
        ("203.0.113.10:53/udp", "check: tcp", CheckType.TCP),
        ("203.0.113.10:53/udp", "check: {type: http, port: 8080}", CheckType.HTTP),
        ("203.0.113.10:53/tcp", "", CheckType.TCP),
    ],
)
def test_a_udp_service_is_not_checked_unless_somebody_says_how(listen: str, settings: str, found: CheckType) -> None:
    assert only(service(settings, listen=listen)).check.type is found


def test_the_defaults_may_say_how_udp_services_are_checked() -> None:
    text = "defaults: {check: {type: http, port: 8080}}\n" + service(listen="203.0.113.10:53/udp")
    assert only(text).check == Check(CheckType.HTTP, port=8080)
    text = "defaults: {check: {rise: 5}}\n" + service(listen="203.0.113.10:53/udp")
    assert only(text).check == Check(CheckType.NONE, rise=5)


def test_tunnel_sources_are_told_apart_by_family() -> None:
    found = configuration.parse('tunnel_source: [10.99.0.0/16, "fd99::/64"]\n' + service(), "FILE")
    assert found.tunnel_source4 == IPv4Network("10.99.0.0/16")
    assert found.tunnel_source6 == IPv6Network("fd99::/64")


@pytest.mark.parametrize(
    ("written", "address", "port", "name"),
    [
        ("10.0.0.12", "10.0.0.12", None, "10.0.0.12"),
        ("10.0.0.12:8080", "10.0.0.12", 8080, "10.0.0.12:8080"),
        ("10.0.0.12:80", "10.0.0.12", None, "10.0.0.12:80"),
    ],
)
def test_backend_addresses(written: str, address: str, port: int | None, name: str) -> None:
    (backend,) = only(service(backends=f"[{{address: '{written}'}}]")).backends
    assert backend == Backend(name, ip_address(address), port)


@pytest.mark.parametrize(
    ("written", "port"), [("2001:db8::1", None), ("[2001:db8::1]", None), ("[2001:db8::1]:8080", 8080)]
)
def test_ipv6_backends_are_named_as_written(written: str, port: int | None) -> None:
    (backend,) = only(service(backends=f"[{{address: '{written}'}}]", listen="[2001:db8::10]:80/udp")).backends
    assert backend == Backend(written, IPv6Address("2001:db8::1"), port)


@pytest.mark.parametrize("affinity", ["flow", "{flow: }", "{flow: {}}"])
def test_neutral_values_of_coming_features_are_accepted(affinity: str) -> None:
    neutral = "slow_start: 0\non_down: rehash\nallow: ['0.0.0.0/0', '::/0']\ndeny: []\nlimits: {new_flows: 0}"
    assert only(service(f"{neutral}\naffinity: {affinity}")) == only(service())


@pytest.mark.parametrize("forward", ["ipip", "gue"])
def test_encapsulation_bridges_families(forward: str) -> None:
    web = only(service(f"forward: {forward}", "[{address: '2001:db8::1'}, {address: '10.0.0.1:80'}]"))
    assert [backend.port for backend in web.backends] == [None, None]


def test_exact_port_range_and_all_ports_may_share_an_address() -> None:
    listens = ["1.1.1.1:80", "1.1.1.1:70-90", "1.1.1.1:91-99", "1.1.1.1:0", "1.1.1.1:80/udp", "1.1.1.2:80"]
    services = [
        {"name": f"s{index}", "listen": listen, "check": "none", "backends": [{"address": "10.0.0.1"}]}
        for index, listen in enumerate(listens)
    ]
    found = configuration.parse(yaml.safe_dump({"services": services}), "FILE").services
    assert [str(one.listen) for one in found] == [text if "/" in text else f"{text}/tcp" for text in listens]


def test_two_nat_services_may_share_a_backend_port() -> None:
    text = service() + "  - {name: api, listen: '203.0.113.11:80', backends: [{address: 10.0.0.11}]}\n"
    assert len(configuration.parse(text, "FILE").services) == 2


@pytest.mark.parametrize(
    ("settings", "mistake"),
    [
        ("scheduler: lc", "scheduler lc counts flows, which takes remembering them"),
        ("scheduler: rr", "scheduler rr would tear connections that nobody remembers apart"),
    ],
)
def test_no_memory_where_one_is_needed(settings: str, mistake: str) -> None:
    assert mistakes(service(f"flows: none\n{settings}")) == [f"FILE:5: services[0].flows: {mistake}"]


@pytest.mark.parametrize(
    ("pool", "addresses"),
    [
        ("[10.0.0.250]", ["10.0.0.250"]),
        ("[10.0.0.100-10.0.0.102, 'fd00::1']", ["10.0.0.100", "10.0.0.101", "10.0.0.102", "fd00::1"]),
        ("[10.0.1.0/30, 10.0.1.2]", ["10.0.1.1", "10.0.1.2"]),
        ("['fd00::1-fd00::2']", ["fd00::1", "fd00::2"]),
    ],
)
def test_addresses_that_full_nat_sends_from(pool: str, addresses: list[str]) -> None:
    assert configuration.parse(f"source_pool: {pool}\n{service()}", "FILE").source_pool == tuple(
        map(ip_address, addresses)
    )


def test_full_nat_without_a_source_pool() -> None:
    assert mistakes(service("forward: full-nat")) == [
        "FILE:5: services[0].forward: full-nat sends from addresses of this host: write source_pool: ['10.0.0.250'] at "
        "the top of the file, with a free IPv4 address of the backends' network"
    ]


@pytest.mark.parametrize(
    ("pool", "mistake"),
    [
        ("[10.0.0.0/16]", "[0]: 10.0.0.0/16 has 65536 addresses; 64 are possible"),
        ("[10.0.0.1-10.0.0.99]", "[0]: 10.0.0.1-10.0.0.99 has 99 addresses; 64 are possible"),
        ("[10.0.0.9-10.0.0.1]", "[0]: 10.0.0.9-10.0.0.1 is not a range like 10.0.0.100-10.0.0.103"),
        ("[10.0.0.1-fd00::1]", "[0]: 10.0.0.1-fd00::1 is not a range like 10.0.0.100-10.0.0.103"),
        ("[10.0.0.11]", "[0]: 10.0.0.11 is already the address of a backend"),
        ("[203.0.113.10]", "[0]: 203.0.113.10 is already the address of a service"),
        ("[10.1.0.1-10.1.0.40, 10.2.0.1-10.2.0.40]", ": 80 addresses are too many; 64 are possible"),
        ("[eth0]", "[0]: eth0 is a name; only IP addresses are taken, names are not looked up"),
    ],
)
def test_mistakes_in_the_source_pool(pool: str, mistake: str) -> None:
    assert mistakes(f"source_pool: {pool}\n{service()}") == [f"FILE:1: source_pool{mistake}"]


def test_affinity_and_control_loss_take_settings() -> None:
    assert only(service("affinity: client")).affinity == Affinity(32, 128, 300.0)
    affinity = only(service("affinity: {client: {prefix4: 24, prefix6: 56, timeout: 20m}}")).affinity
    assert affinity == Affinity(24, 56, 1200.0)
    for text, seconds in (("keep", None), ("pass", 30.0), ("{pass: {after: 5s}}", 5.0)):
        assert configuration.parse(f"on_control_loss: {text}\n{service()}", "FILE").control_loss_s == seconds


def many(services: int, backends: int, first: int = 0) -> str:
    lines = ["services:"]
    for s in range(first, first + services):
        lines += [f"  - name: s{s}", f"    listen: 203.{s >> 16}.{s >> 8 & 255}.{s & 255}:80", "    backends:"]
        lines += [f"      - {{address: 10.{b >> 16}.{b >> 8 & 255}.{b & 255}}}" for b in range(1, backends + 1)]
    return "\n".join(lines)


def test_too_many_services() -> None:
    assert len(configuration.parse(many(4096, 1), "FILE").services) == 4096
    assert mistakes(many(4097, 1)) == [f"FILE:{2 + 4 * 4096}: services: 4097 services are too many; 4096 are possible"]


def test_too_many_backends_in_a_service() -> None:
    assert len(only(many(1, 4096)).backends) == 4096
    assert mistakes(many(1, 4097)) == [
        f"FILE:{5 + 4096}: services[0].backends: 4097 backends are too many; 4096 are possible"
    ]


def test_too_many_backends_in_all() -> None:
    assert sum(len(service.backends) for service in configuration.parse(many(16, 4096), "FILE").services) == 65536
    text = many(16, 4096) + "\n" + many(1, 1, first=16).split("\n", 1)[1]
    assert mistakes(text) == [
        f"FILE:{len(text.splitlines())}: services[16].backends[0]: "
        "65537 backends in all are too many; 65536 are possible"
    ]


def test_load_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "xdplb.yaml"
    path.write_text("\ufeff" + EXAMPLE, encoding="utf-8")
    assert configuration.load(path) == configuration.parse(EXAMPLE, "FILE")
    path.write_text(service("scheduler: rnd"))
    with pytest.raises(ConfigError, match="rnd is not a scheduler") as caught:
        configuration.load(path)
    assert caught.value.mistakes[0].startswith(f"{path}:5: services[0].scheduler: ")


def test_load_says_why_a_file_cannot_be_read(tmp_path: Path) -> None:
    def failure(path: Path) -> tuple[str, str]:
        with pytest.raises(ConfigError) as caught:
            configuration.load(path)
        (mistake,) = caught.value.mistakes
        return mistake.removeprefix(str(path)), caught.value.hint

    mistake, hint = failure(tmp_path / "none.yaml")
    assert mistake == ": there is no such file" and "-c FILE" in hint
    assert failure(tmp_path)[0] == ": cannot be read: is a directory"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"# fine\n# caf\xe9\n")
    mistake, hint = failure(latin)
    assert mistake == ":2: the byte 0xe9 is not UTF-8 text" and "UTF-8" in hint


def test_the_command_line_makes_one_service() -> None:
    found = configuration.from_command_line(
        "203.0.113.10:80", ["10.0.0.11", "10.0.0.12:8080,weight=2,name=b", "10.0.0.13,backup"], ["eth0", "eth1"]
    )
    assert found.interfaces == ("eth0", "eth1")
    (only_service,) = found.services
    assert (only_service.name, only_service.forward, str(only_service.listen)) == (
        "default",
        Forward.NAT,
        "203.0.113.10:80/tcp",
    )
    assert only_service.backends == (
        Backend("10.0.0.11", IPv4Address("10.0.0.11"), None),
        Backend("b", IPv4Address("10.0.0.12"), 8080, weight=2),
        Backend("10.0.0.13", IPv4Address("10.0.0.13"), None, backup=True),
    )
    six = configuration.from_command_line(
        "[2001:db8::10]:53/udp", ["2001:db8::1", "[2001:db8::2]:5353,backup=false"], []
    )
    assert [backend.port for backend in six.services[0].backends] == [None, 5353]


def test_mistakes_of_the_command_line_name_their_option() -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.from_command_line(
            "203.0.113.10",
            ["10.0.0.300", "10.0.0.1,weight=x", "10.0.0.2,wieght=2", "10.0.0.3,weight", "10.0.0.4,name=a,name=b"],
            ["a/b"],
        )
    assert caught.value.mistakes == (
        "interface a/b: a/b cannot be the name of an interface",
        "--listen 203.0.113.10: 203.0.113.10 has no port; write 203.0.113.10:80 (port 0 means all ports)",
        "--backend 10.0.0.300: 10.0.0.300 is not an IP address",
        "--backend 10.0.0.1,weight=x: weight: must be a whole number, but is the text x",
        "--backend 10.0.0.2,wieght=2: unknown key 'wieght', did you mean 'weight'?",
        "--backend 10.0.0.3,weight: weight needs a value: weight=...",
        "--backend 10.0.0.4,name=a,name=b: name is given twice",
    )
    with pytest.raises(ConfigError) as caught:
        configuration.from_command_line("203.0.113.10:80", [], [])
    assert caught.value.mistakes == ("--backend: a service needs at least one backend",)


def test_the_schema_describes_every_key_of_the_example() -> None:
    schema = json.loads(json.dumps(configuration.schema()))
    example = yaml.safe_load(EXAMPLE)
    definitions = schema["$defs"]
    assert example.keys() <= schema["properties"].keys()
    assert example["services"][0].keys() <= definitions["ServicePart"]["properties"].keys()
    assert {key for one in example["services"][0]["backends"] for key in one} == definitions["BackendPart"][
        "properties"
    ].keys()
    assert {"enum": list(CheckType)} in definitions["CheckPart"]["anyOf"]
    assert schema["required"] == ["services"]
