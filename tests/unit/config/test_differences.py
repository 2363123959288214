"""What `diff` and `reload` say of two configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from ipaddress import IPv4Address, IPv6Address

import pytest

from xdplb.config.differences import changes
from xdplb.model import (
    Backend,
    Check,
    CheckType,
    Config,
    FlowMemory,
    Forward,
    HostUpkeep,
    Listen,
    OnAllDown,
    OnDown,
    Protocol,
    Scheduler,
    Service,
    Tls,
    Upkeep,
)

LISTEN = Listen(IPv4Address("203.0.113.10"), 80, 80, Protocol.TCP)
A = Backend("a", IPv4Address("10.0.0.11"), 8080, 10)
B = Backend("b", IPv4Address("10.0.0.12"), None, 20)
WEB = Service("web", LISTEN, Forward.NAT, Scheduler.MAGLEV, Check(), (A, B))
DNS = replace(WEB, name="dns", listen=replace(LISTEN, first_port=53, last_port=53, protocol=Protocol.UDP))


def config(*services: Service) -> Config:
    return Config(("eth0",), services)


def lines(old: Config, new: Config) -> list[tuple[str, str, str]]:
    found = []
    for change in changes(old, new):
        assert isinstance(change, dict)
        assert change.keys() == {"kind", "what", "detail"}
        found.append((str(change["kind"]), str(change["what"]), str(change["detail"])))
    return found


@pytest.mark.parametrize("same", [config(), config(WEB), config(WEB, DNS)])
def test_no_change_is_no_line(same: Config) -> None:
    assert lines(same, replace(same)) == []


def test_the_order_of_services_and_backends_is_no_change() -> None:
    assert lines(config(WEB, DNS), config(DNS, replace(WEB, backends=(B, A)))) == []


def test_a_new_service_is_one_line_whatever_it_holds() -> None:
    added = ("add", "service dns", "203.0.113.10:53/udp, 2 backends")
    assert lines(config(WEB), config(WEB, DNS)) == [added]


def test_a_removed_service_is_one_line() -> None:
    assert lines(config(WEB, DNS), config(WEB)) == [("remove", "service dns", "203.0.113.10:53/udp")]


def test_a_renamed_service_is_one_gone_and_one_new() -> None:
    assert [(kind, what) for kind, what, _ in lines(config(WEB), config(replace(WEB, name="www")))] == [
        ("remove", "service web"),
        ("add", "service www"),
    ]


@pytest.mark.parametrize(
    ("changed", "detail"),
    [
        (
            {"listen": replace(LISTEN, last_port=89)},
            "listen 203.0.113.10:80/tcp -> 203.0.113.10:80-89/tcp",
        ),
        (
            {"listen": replace(LISTEN, address=IPv6Address("2001:db8::10"))},
            "listen 203.0.113.10:80/tcp -> [2001:db8::10]:80/tcp",
        ),
        ({"forward": Forward.GUE}, "forward nat -> gue"),
        ({"scheduler": Scheduler.SOURCE_HASH}, "scheduler maglev -> source-hash"),
        ({"on_all_down": OnAllDown.FAIL_OPEN}, "on_all_down reject -> fail-open"),
        ({"gue_port": 666}, "gue_port 6080 -> 666"),
        ({"on_down": OnDown.KEEP}, "on_down rehash -> keep"),
        ({"flows": FlowMemory.NONE}, "flows remember -> none"),
        ({"check": Check(CheckType.HTTP)}, "check type tcp -> http"),
        ({"check": Check(rise=3, timeout_s=0.5)}, "check timeout 1s -> 0.5s, rise 2 -> 3"),
        ({"check": Check(path="/x", host="a.example")}, "check path / -> /x, host none -> a.example"),
        ({"check": Check(expect=((200, 204), (301, 301)))}, "check expect 200-399 -> 200-204,301"),
        ({"check": Check(send=b"hello", tls=Tls(verify=True))}, "check tls, send"),
    ],
)
def test_each_setting_of_a_service_is_one_line(changed: dict[str, object], detail: str) -> None:
    new = replace(WEB, **changed)  # type: ignore[arg-type]
    assert lines(config(WEB), config(new)) == [("change", "service web", detail)]


def test_no_setting_of_a_service_changes_unseen() -> None:
    """Whatever fields a service has: each is set to something else in turn."""
    for field in fields(Service):
        if field.name == "name":
            continue
        value: object = {"backends": (), "check": Check(rise=9)}.get(field.name, object())
        assert lines(config(WEB), config(replace(WEB, **{field.name: value}))), field.name  # type: ignore[arg-type]


def test_no_setting_of_a_check_changes_unseen() -> None:
    for field in fields(Check):
        other = replace(WEB.check, **{field.name: object()})  # type: ignore[arg-type]
        (line,) = lines(config(WEB), config(replace(WEB, check=other)))
        assert line[2].startswith("check ")


def test_no_setting_of_a_backend_changes_unseen() -> None:
    for field in fields(Backend):
        if field.name == "name":
            continue
        other = replace(A, **{field.name: object()})  # type: ignore[arg-type]
        assert len(lines(config(WEB), config(replace(WEB, backends=(other, B))))) == 1, field.name


def test_two_settings_are_two_lines() -> None:
    new = replace(WEB, forward=Forward.DSR, scheduler=Scheduler.SOURCE_HASH)
    assert len(lines(config(WEB), config(new))) == 2


def with_backends(*backends: Backend) -> Config:
    return config(replace(WEB, backends=backends))


@pytest.mark.parametrize(
    ("after", "line"),
    [
        (lambda: (A, B, Backend("c", IPv4Address("10.0.0.13"), None, 5)), ("add", "c", "10.0.0.13:80, weight 5")),
        (
            lambda: (A, B, Backend("c", IPv6Address("2001:db8::1"), 81)),
            ("add", "c", "[2001:db8::1]:81, weight 1"),
        ),
        (lambda: (A,), ("remove", "b", "10.0.0.12:80")),
        (
            lambda: (replace(A, address=IPv4Address("10.0.0.99")), B),
            ("change", "a", "address 10.0.0.11 -> 10.0.0.99"),
        ),
        (lambda: (replace(A, port=None), B), ("change", "a", "port 8080 -> the service's")),
        (lambda: (A, replace(B, port=81)), ("change", "b", "port the service's -> 81")),
        (lambda: (replace(A, weight=11), B), ("change", "a", "weight 10 -> 11")),
        (lambda: (replace(A, weight=11, port=81), B), ("change", "a", "port 8080 -> 81, weight 10 -> 11")),
        (lambda: (replace(A, backup=True), B), ("change", "a", "backup False -> True")),
    ],
)
def test_each_backend_that_changes_is_one_line(
    after: Callable[[], tuple[Backend, ...]], line: tuple[str, str, str]
) -> None:
    kind, name, detail = line
    assert lines(with_backends(A, B), with_backends(*after())) == [(kind, f"backend web/{name}", detail)]


def test_lines_come_service_by_service() -> None:
    old = config(WEB, DNS)
    new = config(replace(WEB, backends=(A,), forward=Forward.DSR), replace(DNS, backends=(replace(A, weight=1), B)))
    assert [what for _, what, _ in lines(old, new)] == ["service web", "backend web/b", "backend dns/a"]


def test_each_key_of_the_hosts_upkeep_is_one_line() -> None:
    upkeep = HostUpkeep(addresses=Upkeep.ALARM, interval_s=30.0)
    assert lines(config(), replace(config(), host=upkeep)) == [
        ("change", "host", "addresses mend -> alarm"),
        ("change", "host", "interval 10s -> 30s"),
    ]


def test_another_hash_key_breaks_flows_once_it_is_taken() -> None:
    for before, after in ((None, "one key of the two"), ("one key of the two", "the other of the two"), ("a", None)):
        ((kind, what, detail),) = lines(replace(config(WEB), hash_key=before), replace(config(WEB), hash_key=after))
        assert (kind, what) == ("change", "hash_key")
        assert detail.startswith("not by a reload: only the next `up` takes it, and then breaks the flows")
