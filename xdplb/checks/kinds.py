"""All kinds of checks by their `type`.

A new kind is a file beside this one, a line here, and its word in model.CheckType. Its keys go to config/parts.py, its
reasons to core/health.py.
"""

from __future__ import annotations

from collections.abc import Callable

from xdplb.checks.agent import AgentCheck
from xdplb.checks.attempt import Attempt, CheckFailed, Kind, Steps
from xdplb.checks.dns import DnsCheck
from xdplb.checks.endpoint import Endpoint
from xdplb.checks.exec import ExecCheck
from xdplb.checks.http import HttpCheck
from xdplb.checks.ping import PingCheck, Pinger
from xdplb.checks.tcp import TcpCheck
from xdplb.checks.udp import UdpCheck
from xdplb.model import CheckType

_KINDS: dict[CheckType, Callable[[Endpoint], Kind]] = {
    CheckType.TCP: TcpCheck,
    CheckType.HTTP: HttpCheck,
    CheckType.HTTPS: HttpCheck,
    CheckType.UDP: UdpCheck,
    CheckType.DNS: DnsCheck,
    CheckType.EXEC: ExecCheck,
    CheckType.AGENT: AgentCheck,
}


def kind_of(endpoint: Endpoint, pinger: Pinger) -> Kind:
    """The checks of this endpoint. One that cannot be made fails, each time, with the reason."""
    try:
        if endpoint.check.type is CheckType.PING:
            return PingCheck(endpoint, pinger)
        return _KINDS[endpoint.check.type](endpoint)
    except (ValueError, OSError) as error:
        return _Unusable(str(error))


class _Unusable:
    def __init__(self, cause: str) -> None:
        self._cause = cause

    def __call__(self, attempt: Attempt) -> Steps:
        raise CheckFailed(self._cause)
        yield
