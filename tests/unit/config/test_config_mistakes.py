"""Mistakes in the configuration file: each is told once, where it is, with what to do."""

from __future__ import annotations

from ipaddress import ip_address
from textwrap import indent

import pytest
from configuring import mistakes, only, service

from xdplb.config import read as configuration
from xdplb.errors import ConfigError
from xdplb.model import (
    Config,
)

SETTING_MISTAKES = [
    ("schedular: maglev", "services[0]: unknown key 'schedular', did you mean 'scheduler'?"),
    (
        "check: {zzz: 1}",
        "services[0].check: unknown key 'zzz'; known: "
        "type, interval, fast_interval, timeout, rise, fall, port, "
        "via, path, host, expect, tls, send, name, record, command",
    ),
    (
        "scheduler: rnd",
        "services[0].scheduler: rnd is not a scheduler; available: maglev, source-hash, rr, wrr, lc, wlc, p2c",
    ),
    ("scheduler: maglve", "services[0].scheduler: maglve is not a scheduler, did you mean 'maglev'?"),
    (
        "scheduler: 3",
        "services[0].scheduler: 3 is not a scheduler; available: maglev, source-hash, rr, wrr, lc, wlc, p2c",
    ),
    ("affinity: clinet", "services[0].affinity: clinet is not an affinity, did you mean 'client'?"),
    (
        "affinity: {client: {prefix4: 33}}",
        "services[0].affinity: prefix4 must be a whole number from 1 to 32, but is 33",
    ),
    ("affinity: {client: {prefix: 24}}", "services[0].affinity: unknown key 'prefix', did you mean 'prefix6'?"),
    (
        "affinity: {client: {timeout: 5}}",
        "services[0].affinity: 5 has no unit; write 5s for seconds (units: ms, s, m, h)",
    ),
    ("affinity: {client: {timeout: 2h}}", "services[0].affinity: must be from 1s to 34m, but is 2h"),
    ("affinity: {client: 24}", "services[0].affinity: the settings of client must be a mapping, but are 24"),
    ("affinity: {flow: {x: 1}}", "services[0].affinity: flow has no settings"),
    ("on_remove: rset", "services[0].on_remove: rset is not an on_remove policy, did you mean 'reset'?"),
    ("check: {type: htp}", "services[0].check.type: htp is not a check type, did you mean 'http'?"),
    ("check: []", "services[0].check: must be a mapping, but is a list"),
    ("check:", "services[0].check: must be a mapping, but is empty"),
    (
        "check: {interval: 2}",
        "services[0].check.interval: 2 has no unit; write 2s for seconds (units: ms, s, m, h)",
    ),
    (
        "check: {interval: '1.5'}",
        "services[0].check.interval: 1.5 has no unit; write 1.5s for seconds (units: ms, s, m, h)",
    ),
    (
        "check: {interval: 2d}",
        "services[0].check.interval: 2d is not a duration like 2s, 500ms, 1.5s or 5m",
    ),
    ("check: {interval: 0}", "services[0].check.interval: 0 is too short; from 1ms to 24h is possible"),
    ("check: {timeout: 0s}", "services[0].check.timeout: 0s is too short; from 1ms to 24h is possible"),
    ("check: {timeout: 25h}", "services[0].check.timeout: 25h is too long; from 1ms to 24h is possible"),
    ("check: {rise: 0}", "services[0].check.rise: must be at least 1, but is 0"),
    ("check: {fall: two}", "services[0].check.fall: must be a whole number, but is the text two"),
    ("check: {fall: 1.5}", "services[0].check.fall: must be a whole number, but is 1.5"),
    ("check: {port: 65536}", "services[0].check.port: must be at most 65535, but is 65536"),
    (
        "check: {type: http, path: healthz}",
        "services[0].check.path: healthz is not a path; it begins with / and has no spaces",
    ),
    (
        "check: {type: http, host: 'a b'}",
        "services[0].check.host: 'a b' cannot stand in a Host header; write example.org or example.org:8080",
    ),
    *(
        (
            f"check: {{type: http, expect: {value}}}",
            f"services[0].check.expect: {value} does not name status codes; write 200, 200-399 or 200,301-302",
        )
        for value in ("99", "600", "399-200", "2xx", "true")
    ),
    (
        "check: {path: /healthz}",
        "services[0].check.path: path belongs to http and https checks, not to a tcp check",
    ),
    ("slow_start: 2h", "services[0].slow_start: 2h is too long; up to 1h is possible"),
    ("on_down: kepe", "services[0].on_down: kepe is not an on_down policy, did you mean 'keep'?"),
    ("on_down: drop", "services[0].on_down: drop is not an on_down policy; available: rehash, keep"),
    ("flows: nono", "services[0].flows: nono is not a flows policy, did you mean 'none'?"),
    ("flows: true", "services[0].flows: true is not a flows policy; available: remember, all, none"),
    (
        "on_all_down: fail-opn",
        "services[0].on_all_down: fail-opn is not an on_all_down policy, did you mean 'fail-open'?",
    ),
    (
        "allow: [10.0.0.0/8]",
        "services[0].allow: allow is not available yet; only everybody, [0.0.0.0/0], is possible",
    ),
    ("allow: 0.0.0.0/0", "services[0].allow: must be a list of networks, but is the text 0.0.0.0/0"),
    ("deny: [10.0.0.0/8]", "services[0].deny: deny is not available yet; only [] is possible"),
    ("deny: [ten]", "services[0].deny: ten is not a network like 10.99.0.0/16"),
    (
        "limits: {new_flows: 5}",
        "services[0].limits.new_flows: limits are not available yet; only 0, none, is possible",
    ),
    ("limits: {new_flows: -1}", "services[0].limits.new_flows: must be a whole number from 0, but is -1"),
    ("limits: {new_flow: 0}", "services[0].limits: unknown key 'new_flow', did you mean 'new_flows'?"),
    ("gue_port: 0", "services[0].gue_port: must be at least 1, but is 0"),
]


@pytest.mark.parametrize(("setting", "mistake"), SETTING_MISTAKES)
def test_mistakes_in_the_settings_of_a_service(setting: str, mistake: str) -> None:
    assert mistakes(service(f"# a comment\n{setting}")) == [f"FILE:6: {mistake}"]


@pytest.mark.parametrize(("setting", "mistake"), [case for case in SETTING_MISTAKES if "path belongs" not in case[1]])
def test_mistakes_in_the_defaults_are_told_once(setting: str, mistake: str) -> None:
    second = "  - {name: api, listen: '203.0.113.11:80', backends: [{address: 10.0.0.11}]}\n"
    text = "defaults:\n" + indent(f"{setting}\n", "  ") + service() + second
    assert mistakes(text) == [f"FILE:2: {mistake.replace('services[0]', 'defaults')}"]


@pytest.mark.parametrize(
    ("listen", "mistake"),
    [
        ("203.0.113.300:80", "203.0.113.300 is not an IP address"),
        ("example.org:80", "example.org is a name; only IP addresses are taken, names are not looked up"),
        ("203.0.113.10", "203.0.113.10 has no port; write 203.0.113.10:80 (port 0 means all ports)"),
        ("2001:db8::10", "2001:db8::10 has no port; write [2001:db8::10]:80 (port 0 means all ports)"),
        ("[203.0.113.10]:80", "[203.0.113.10]:80: brackets are for IPv6 addresses only"),
        ("203.0.113.10:http", "http is not a port, nor a range like 8000-8099"),
        ("203.0.113.10:", "'' is not a port, nor a range like 8000-8099"),
        ("203.0.113.10:65536", "port 65536 is out of range; ports end at 65535"),
        ("203.0.113.10:90-80", "the port range 90-80 runs backwards; write 80-90"),
        ("203.0.113.10:0-80", "a port range begins at 1 or higher; write port 0 alone for all ports"),
        ("203.0.113.10:80/sctp", "sctp is not a protocol; available: tcp, udp"),
        ("203.0.113.10:80/", "'' is not a protocol; available: tcp, udp"),
        ("224.0.0.1:80", "224.0.0.1 is a multicast address; packets for it cannot be balanced"),
        ("[ff02::1]:80", "ff02::1 is a multicast address; packets for it cannot be balanced"),
        ("0.0.0.0:80", "0.0.0.0 is an unspecified address; packets for it cannot be balanced"),
        ("[::]:80", ":: is an unspecified address; packets for it cannot be balanced"),
        ("127.0.0.1:80", "127.0.0.1 is a loopback address; packets for it cannot be balanced"),
        ("[::1]:80", "::1 is a loopback address; packets for it cannot be balanced"),
        ("[fe80::1%eth0]:80", "fe80::1%eth0 has a zone; leave out what begins with %"),
        ("[::ffff:1.2.3.4]:80", "::ffff:1.2.3.4 never appears in a packet; write 1.2.3.4"),
    ],
)
def test_mistakes_in_listen(listen: str, mistake: str) -> None:
    assert mistakes(service(listen=listen)) == [f"FILE:3: services[0].listen: {mistake}"]


@pytest.mark.parametrize(
    ("item", "mistake"),
    [
        ("{address: 10.0.0.300}", "[1].address: 10.0.0.300 is not an IP address"),
        ("{address: 10.0.0.0/24}", "[1].address: 10.0.0.0/24 is not an IP address"),
        ("{address: 10}", "[1].address: 10 is not an IP address"),
        (
            "{address: web-1.example.org}",
            "[1].address: web-1.example.org is a name; only IP addresses are taken, names are not looked up",
        ),
        (
            "{address: localhost:80}",
            "[1].address: localhost is a name; only IP addresses are taken, names are not looked up",
        ),
        ("{address: '10.0.0.1:0'}", "[1].address: a backend has one port, from 1 to 65535, not 0"),
        ("{address: '10.0.0.1:80-90'}", "[1].address: a backend has one port, from 1 to 65535, not 80-90"),
        (
            "{address: 127.0.0.1}",
            "[1].address: 127.0.0.1 is a loopback address; packets for it cannot be balanced",
        ),
        ("{address: 203.0.113.10}", "[1].address: 203.0.113.10 is the service's own listen address"),
        ("{address: 10.0.0.11}", "[1].address: 10.0.0.11 is already backend 'a' of this service"),
        ("{address: '10.0.0.11:80'}", "[1].address: 10.0.0.11:80 is already backend 'a' of this service"),
        ("{name: a, address: 10.0.0.12}", "[1].name: the name 'a' already belongs to backend 10.0.0.11"),
        (
            "{name: a/b, address: 10.0.0.12}",
            "[1].name: a/b is not a name; "
            "a name is up to 63 letters, digits and . _ : - of ASCII, a letter or digit first",
        ),
        ("{name: 7, address: 10.0.0.12}", "[1].name: must be text like web-1, but is 7; put it in quotes"),
        ("{address: 10.0.0.12, weight: 65536}", "[1].weight: must be at most 65535, but is 65536"),
        ("{address: 10.0.0.12, weight: -1}", "[1].weight: must be at least 0, but is -1"),
        ("{address: 10.0.0.12, weight: '5'}", "[1].weight: must be a whole number, but is the text 5"),
        ("{address: 10.0.0.12, weight: true}", "[1].weight: must be a whole number, but is true"),
        ("{address: 10.0.0.12, backup: 1}", "[1].backup: must be true or false, but is 1"),
        ("{address: 10.0.0.12, wieght: 1}", "[1]: unknown key 'wieght', did you mean 'weight'?"),
        ("{name: b}", "[1]: 'address' is missing"),
        ("10.0.0.12", "[1]: must be a mapping, but is the text 10.0.0.12"),
        ("", "[1]: must be a mapping, but is empty"),
        (
            "{address: '2001:db8::1'}",
            "[1].address: forward: nat cannot bring IPv4 packets to an IPv6 backend; ipip and gue can",
        ),
    ],
)
def test_mistakes_in_a_backend(item: str, mistake: str) -> None:
    text = service(backends=f"\n      - {{name: a, address: 10.0.0.11}}\n      - {item}")
    assert mistakes(text) == [f"FILE:6: services[0].backends{mistake}"]


@pytest.mark.parametrize("written", ["[]", "", "{}"])
def test_a_service_needs_backends(written: str) -> None:
    assert mistakes(service(backends=written)) == ["FILE:4: services[0].backends: a service needs at least one backend"]


def test_a_service_of_weights_zero_is_refused() -> None:
    assert mistakes(service(backends="[{address: 10.0.0.1, weight: 0}, {address: 10.0.0.2, weight: 0}]")) == [
        "FILE:4: services[0].backends: all weights are 0, so that no backend would take a packet"
    ]


@pytest.mark.parametrize(
    ("forward", "listen", "mistake"),
    [
        ("ipip", "203.0.113.10:80", "forward: ipip cannot change the port; leave out :8080 (the port stays 80)"),
        ("dsr", "203.0.113.10:80", "forward: dsr cannot change the port; leave out :8080 (the port stays 80)"),
        (
            "gue",
            "203.0.113.10:80-90",
            "forward: gue cannot change the port; leave out :8080 (the port stays the packet's own)",
        ),
    ],
)
def test_only_nat_can_change_the_port(forward: str, listen: str, mistake: str) -> None:
    assert mistakes(service(f"forward: {forward}", "[{address: '10.0.0.11:8080'}]", listen)) == [
        f"FILE:4: services[0].backends[0].address: {mistake} or use forward: nat"
    ]


@pytest.mark.parametrize("ports", ["80-90", "0"])
def test_nat_keeps_the_port_where_a_service_has_several(ports: str) -> None:
    assert mistakes(service("check: none", "[{address: '10.0.0.11:80'}]", f"203.0.113.10:{ports}")) == [
        "FILE:4: services[0].backends[0].address: forward: nat keeps each packet's port where a service has several "
        f"(203.0.113.10:{ports}/tcp), so that replies name the port they answer for; leave out :80"
    ]


def test_all_ports_leave_a_check_without_a_port() -> None:
    assert mistakes(service(listen="203.0.113.10:0")) == [
        "FILE:2: services[0].check: a service on all ports has no port to check; set check.port, or check: none"
    ]
    assert only(service("check: {port: 80}", listen="203.0.113.10:0")).check.port == 80


@pytest.mark.parametrize(
    ("first", "second", "mistake"),
    [
        ("1.1.1.1:80", "1.1.1.1:80/tcp", "1.1.1.1:80/tcp is already served by service 'web'"),
        ("1.1.1.1:0", "1.1.1.1:0", "1.1.1.1:0/tcp is already served by service 'web'"),
        ("1.1.1.1:80-90", "1.1.1.1:90-99", "1.1.1.1:90-99/tcp overlaps 1.1.1.1:80-90/tcp of service 'web'"),
        ("1.1.1.1:80-90", "1.1.1.1:81-82", "1.1.1.1:81-82/tcp overlaps 1.1.1.1:80-90/tcp of service 'web'"),
        ("[::8]:80/udp", "[0:0::8]:80/udp", "[::8]:80/udp is already served by service 'web'"),
    ],
)
def test_services_that_meet(first: str, second: str, mistake: str) -> None:
    backend = "fd00::1" if first.startswith("[") else "10.0.0.1"
    text = service("check: none", f"[{{address: '{backend}'}}]", first)
    text += f"\n  - name: api\n    check: none\n    listen: '{second}'\n    backends: [{{address: '{backend}'}}]\n"
    assert mistakes(text) == [f"FILE:8: services[1].listen: {mistake}"]


def test_service_names_are_distinct() -> None:
    text = service() + "  - name: web\n    listen: 203.0.113.11:80\n    backends: [{address: 10.0.0.11}]\n"
    assert mistakes(text) == ["FILE:5: services[1].name: the name 'web' already belongs to services[0]"]


@pytest.mark.parametrize(
    ("top", "mistake"),
    [
        ("interfaces: eth0", "interfaces: must be a list, but is the text eth0"),
        ("interfaces: [eth0, a/b]", "interfaces[1]: a/b cannot be the name of an interface"),
        ("interfaces: [a b]", "interfaces[0]: 'a b' cannot be the name of an interface"),
        ("interfaces: [..]", "interfaces[0]: .. cannot be the name of an interface"),
        ("interfaces: [eth0, eth1, eth0]", "interfaces[2]: eth0 is given twice"),
        ("hash_key: short", "hash_key: 5 characters are too few for a secret; use 16 or more, or leave it out"),
        ("hash_key: 5", "hash_key: must be text like a-long-random-secret, but is 5; put it in quotes"),
        (
            "tunnel_source: [10.9.9.9/16]",
            "tunnel_source[0]: 10.9.9.9/16 is not a whole network, did you mean 10.9.0.0/16?",
        ),
        (
            "tunnel_source: [0.0.0.0/7]",
            "tunnel_source[0]: 0.0.0.0/7 is too large; an IPv4 prefix of /8 to /32 is possible",
        ),
        (
            "tunnel_source: ['fd00::/63']",
            "tunnel_source[0]: fd00::/63 is too large; an IPv6 prefix of /64 to /128 is possible",
        ),
        (
            "tunnel_source: [10.0.0.0/8, 11.0.0.0/8]",
            "tunnel_source[1]: a second IPv4 prefix; one for each family is possible",
        ),
        ("flow_cache: {capcity: 4096}", "flow_cache: unknown key 'capcity', did you mean 'capacity'?"),
        ("flow_cache: {capacity: 512}", "flow_cache.capacity: must be at least 1024, but is 512"),
        ("flow_cache: {capacity: 67108865}", "flow_cache.capacity: must be at most 67108864, but is 67108865"),
        ("flow_cache: {window: 900}", "flow_cache.window: 900 has no unit; write 900s for seconds"),
        ("flow_cache: {established: 1h}", "flow_cache.established: must be from 1s to 34m, but is 1h"),
        ("flow_cache: {datagram: 500ms}", "flow_cache.datagram: must be from 1s to 34m, but is 500ms"),
        ("defaults: {flow_cache: {window: 1m}}", "defaults: unknown key 'flow_cache'"),
        ("host: {addresses: mnd}", "host.addresses: mnd is not an upkeep of addresses, did you mean 'mend'?"),
        ("host: {settings: never}", "host.settings: never is not an upkeep of settings; available: mend, alarm"),
        ("host: {interval: 100ms}", "host.interval: must be from 1s to 1h, but is 100ms"),
        ("host: {adresses: mend}", "host: unknown key 'adresses', did you mean 'addresses'?"),
        ("flow_cache: []", "flow_cache: must be a mapping, but is a list"),
        ("defualts: {}", "unknown key 'defualts', did you mean 'defaults'?"),
        ("defaults: []\ndefaults: {}", "key 'defaults' is given twice, first on line 2"),
        ("defaults: {name: x}", "defaults: unknown key 'name'"),
        ("defaults: [a]", "defaults: must be a mapping, but is a list"),
    ],
)
def test_mistakes_at_the_top(top: str, mistake: str) -> None:
    line = 1 + len(top.splitlines())
    (found,) = mistakes(f"# comment\n{top}\n{service()}")
    assert found.startswith(f"FILE:{line}: {mistake}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "FILE:1: the file is empty"),
        ("# nothing\n", "FILE:1: the file is empty"),
        ("[]", "FILE:1: must be a mapping with the key 'services', but is a list"),
        ("hello", "FILE:1: must be a mapping with the key 'services', but is the text hello"),
        ("interfaces: [eth0]", "FILE:1: 'services' is missing"),
        ("\nservices:", "FILE:2: services: must be a list, but is empty"),
        ("services: {web: {}}", "FILE:1: services: must be a list, but is a mapping"),
        ("services:\n  - web", "FILE:2: services[0]: must be a mapping, but is the text web"),
        ("services:\n  - backends: [{address: 10.0.0.1}]\n    name: a", "FILE:2: services[0]: 'listen' is missing"),
        ("a:\n b: c: d", "FILE:2: not valid YAML: mapping values are not allowed in this context"),
    ],
)
def test_files_of_the_wrong_shape(text: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.parse(text, "FILE")
    assert caught.value.mistakes == (found,)
    assert caught.value.hint


def test_a_list_of_no_services_is_a_configuration() -> None:
    assert configuration.parse("services: []", "FILE") == Config((), ())


def test_every_mistake_is_told_in_one_run_in_the_order_of_the_lines() -> None:
    found = mistakes(
        """\
        hash_key: short
        services:
          - name: web
            listen: 203.0.113.10:80
            schedular: rr
            check: {interval: 2}
            backends:
              - {name: a, address: 10.0.0.11}
              - {name: a, address: 10.0.0.12, weight: x}
              - {name: c, address: 10.0.0.300}
          - name: web
            listen: 203.0.113.10:80
            forward: dsr
            check: {rise: 0}
            backends:
              - address: "10.0.0.1:81"
            backends: []
          - name: api
            forwrad: ipip
            listen: 203.0.113.10:90
            backends: [{address: "2001:db8::1"}]
        """
    )
    assert found == [
        "FILE:1: hash_key: 5 characters are too few for a secret; use 16 or more, or leave it out",
        "FILE:5: services[0]: unknown key 'schedular', did you mean 'scheduler'?",
        "FILE:6: services[0].check.interval: 2 has no unit; write 2s for seconds (units: ms, s, m, h)",
        "FILE:9: services[0].backends[1].weight: must be a whole number, but is the text x",
        "FILE:9: services[0].backends[1].name: the name 'a' already belongs to backend 10.0.0.11",
        "FILE:10: services[0].backends[2].address: 10.0.0.300 is not an IP address",
        "FILE:11: services[1].name: the name 'web' already belongs to services[0]",
        "FILE:12: services[1].listen: 203.0.113.10:80/tcp is already served by service 'web'",
        "FILE:14: services[1].check.rise: must be at least 1, but is 0",
        "FILE:16: services[1].backends[0].address: forward: dsr cannot change the port; "
        "leave out :81 (the port stays 80) or use forward: nat",
        "FILE:17: services[1]: key 'backends' is given twice, first on line 15",
        "FILE:19: services[2]: unknown key 'forwrad', did you mean 'forward'?",
    ]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (
            service(backends="[{address: 10.0.0.11}, {address: 10.0.0.11}]"),
            "FILE:4: services[0].backends[1].address: 10.0.0.11 is already backend '10.0.0.11' of this service",
        ),
        (
            "defaults: {forward: ipipp}\n" + service(backends="[{address: fd00::1}]"),
            "FILE:1: defaults.forward: ipipp is not a forward mode, did you mean 'ipip'?",
        ),
        (
            service("forwrad: ipip", "[{address: fd00::1}]"),
            "FILE:5: services[0]: unknown key 'forwrad', did you mean 'forward'?",
        ),
        (
            service(backends="[{address: 10.0.0.1, weight: 0}, {address: 10.0.0.300}]"),
            "FILE:4: services[0].backends[1].address: 10.0.0.300 is not an IP address",
        ),
        (
            service("check: {typ: http, path: /healthz}"),
            "FILE:5: services[0].check: unknown key 'typ', did you mean 'type'?",
        ),
        (
            service("affinity: {client: {timeout: 3s}}"),
            "FILE:5: services[0].affinity: a timeout of 3s has no effect: "
            "clients stay for flow_cache.established, 900s; make it as long, or that shorter",
        ),
        (
            "flow_cache: {datagram: 1m}\n"
            + service("affinity: {client: {timeout: 59s}}", listen="203.0.113.10:53/udp"),
            "FILE:6: services[0].affinity: a timeout of 59s has no effect: clients stay for flow_cache.datagram, 60s; "
            "make it as long, or that shorter",
        ),
        (
            service("check: {prot: 80}", listen="203.0.113.10:0"),
            "FILE:5: services[0].check: unknown key 'prot', did you mean 'port'?",
        ),
    ],
)
def test_one_mistake_does_not_bring_up_others(text: str, mistake: str) -> None:
    assert mistakes(text) == [mistake]


VIPS_AND_BACKENDS = [
    ("203.0.113.10:80", "203.0.113.20:80", "10.0.0.11", "203.0.113.10"),
    ("203.0.113.10:80", "203.0.113.20:53/udp", "10.0.0.11", "203.0.113.10"),
    ("10.0.0.12:443", "203.0.113.20:80", "10.0.0.11", "10.0.0.12"),
    ('"[2001:db8::10]:80"', '"[2001:db8::20]:80"', "fd00::11", "2001:db8:0::10"),
]


@pytest.mark.parametrize(("web", "dns", "of_web", "of_dns"), VIPS_AND_BACKENDS)
@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_a_backend_at_an_address_that_this_host_takes_is_told_at_both_places(
    web: str, dns: str, of_web: str, of_dns: str, forward: str
) -> None:
    text = f"""
services:
  - name: web
    listen: {web}
    forward: {forward}
    backends: [{{name: a, address: "{of_web}"}}]
  - name: dns
    listen: {dns}
    forward: {forward}
    backends: [{{name: b, address: "{of_dns}"}}]
"""
    with pytest.raises(ConfigError) as caught:
        configuration.parse(text, "FILE")
    first, second = caught.value.mistakes
    address = ip_address(of_dns)
    assert first == f"FILE:4: services[0].listen: {address} is already the address of backend 'b' of service 'dns'"
    assert second == (
        f"FILE:10: services[1].backends[0].address: on {address} listens service 'web': this host takes that address, "
        "so that packets to the backend would end here"
    )


def test_a_listen_address_of_many_backends_is_told_once_at_the_service_and_at_each_of_them() -> None:
    others = "".join(
        f"  - {{name: s{n}, listen: '203.0.113.{20 + n}:80', backends: [{{address: 203.0.113.10}}]}}\n"
        for n in range(3)
    )
    text = f"services:\n  - {{name: web, listen: '203.0.113.10:80', backends: [{{address: 10.0.0.1}}]}}\n{others}"
    with pytest.raises(ConfigError) as caught:
        configuration.parse(text, "FILE")
    assert [mistake.split(":")[1] for mistake in caught.value.mistakes] == ["2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("cache", "timeout"),
    [("", "15m"), ("flow_cache: {established: 3s}", "3s"), ("flow_cache: {established: 34m}", "5m")],
)
def test_an_affinity_that_lasts_as_long_as_flows_do_or_the_default_is_none(cache: str, timeout: str) -> None:
    assert only(f"{cache}\n{service(f'affinity: {{client: {{timeout: {timeout}}}}}')}").affinity
