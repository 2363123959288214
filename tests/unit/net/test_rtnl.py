"""What is made of rtnetlink's messages as pyroute2 decodes them."""

from __future__ import annotations

from typing import Any

import pytest

from xdplb.net import rtnl


@pytest.mark.parametrize("name", [104, 0, None, "", "RTM_NEWTFILTER"])
def test_what_pyroute2_or_we_know_no_name_for_is_passed_over(name: Any) -> None:
    assert rtnl.event({"header": {"type": 200}, "event": name, "family": 2}) is None
