"""What is made of rtnetlink's messages as pyroute2 decodes them."""

from __future__ import annotations

from typing import Any

import pytest

from xdplb.net import rtnl
from xdplb.net.next_hops import LinkEvent


@pytest.mark.parametrize("name", [104, 0, None, "", "RTM_NEWTFILTER"])
def test_what_pyroute2_or_we_know_no_name_for_is_passed_over(name: Any) -> None:
    assert rtnl.event({"header": {"type": 200}, "event": name, "family": 2}) is None


class LinkMessage(dict[str, Any]):
    """As of pyroute2: `get` looks among the attributes first."""

    def get(self, name: Any, default: Any = None) -> Any:
        attributes = {"event": 8, "ifname": "eth0", "mtu": 1500, "address": "02:00:00:00:00:02"}  # IFLA_EVENT_*
        return attributes.get(name, default)


def test_a_link_event_with_a_reason_is_a_link_event() -> None:
    message = LinkMessage(header={"type": 16}, event="RTM_NEWLINK", family=0, index=2, ifi_type=1, flags=1)
    found = rtnl.event(message)
    assert isinstance(found, LinkEvent) and found.interface.name == "eth0" and not found.deleted
