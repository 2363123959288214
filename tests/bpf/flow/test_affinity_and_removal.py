"""Clients that stay together, and connections whose backend the file drops."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flowlab import ACK, FIN, SYN, Lab, service
from flowmodel import Flow

from xdplb.model import Affinity, OnRemove, Scheduler


def ports_of(flow: Flow, count: int = 20) -> list[Flow]:
    return [replace(flow, port=20_000 + number) for number in range(count)]


@pytest.mark.parametrize("scheduler", [Scheduler.MAGLEV, Scheduler.RR, Scheduler.LC])
def test_all_flows_of_a_client_go_to_one_backend_and_stay_there(choosing: Lab, scheduler: Scheduler) -> None:
    choosing.start(service(scheduler=scheduler, affinity=Affinity()))
    clients = choosing.flows(100)
    homes = {client: choosing.syn(client) for client in clients}
    assert set(homes.values()) == {"a", "b", "c"}
    if scheduler is Scheduler.MAGLEV:
        assert choosing.remembered == 0
    for change in (lambda: choosing.drain("a"), lambda: choosing.pools("abcd"), lambda: choosing.ready("a")):
        change()
        for client, home in homes.items():
            for flow in ports_of(client, 3):
                assert [choosing.send(flow, flags) for flags in (SYN, ACK, FIN | ACK)] == [home] * 3


def test_a_removed_backends_connections_are_reset_and_no_others(choosing: Lab) -> None:
    choosing.start(service(on_remove=OnRemove.RESET))
    unknown, others = choosing.flows(30, of="a"), choosing.flows(30, of="b")
    remembered = choosing.flows(30, of="a")
    choosing.drain("a")
    assert choosing.sent_to(remembered) == {"a": 30}
    choosing.pools("bc")
    assert choosing.sent_to(remembered + unknown) == {None: 60}
    assert choosing.sent_to(others) == {"b": 30}
    for flow in choosing.flows(200):
        assert choosing.syn(flow) == choosing.send(flow) in ("b", "c")
