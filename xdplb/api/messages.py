"""The JSON that commands print with `-o json` and that travels over the control socket, as types.

Times are ISO 8601 in UTC, counters are since the packet path was set up, rates per second.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypeAlias, TypedDict

from xdplb.config.differences import Change

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"


class Encoded(str):
    """JSON as text, as a part of an answer: where there are tens of thousands of them, encoding takes long."""

    __slots__ = ()


GROUP = "xdplb"
"""Whose members may use the control socket, beside root."""


class CheckStatus(TypedDict):
    """Of the latest check; `cause` says in words why it failed, and is empty where it did not. `agent` is what the
    backend asks for, "ready 75%", where that is not the usual.
    """

    duration_ms: float
    cause: NotRequired[str]
    agent: NotRequired[str]


class Rates(TypedDict):
    packets_per_s: float
    bytes_per_s: float


class BackendStatus(TypedDict):
    """`active_flows` is null where not all flows are remembered; `open_flows` are those of `remembered_flows` that have
    neither ended nor fallen silent; `reachable` is whether a next hop is known; `slow_start` is how much of its
    weight a backend has that grows into it, 0.05 to 0.95; `path_mtu` is what the way of encapsulated packets carries,
    where a router reported less than the interface says.
    """

    name: str
    address: str
    state: Literal["unknown", "up", "down"]
    admin: Literal["active", "drain", "maint"]
    reason: str
    weight: int
    effective_weight: int
    active_flows: int | None
    open_flows: NotRequired[int]
    remembered_flows: NotRequired[int]
    last_change: str
    backup: NotRequired[bool]
    reachable: NotRequired[bool]
    slow_start: NotRequired[float]
    path_mtu: NotRequired[int]
    check: NotRequired[CheckStatus]
    rates: NotRequired[Rates]


class ServiceStatus(TypedDict):
    name: str
    listen: str
    forward: str
    scheduler: str
    backends: list[BackendStatus]


class Alarm(TypedDict):
    """What is wrong now: `name` is a label of metrics, `fix` what to do about it."""

    name: str
    since: str
    text: str
    fix: str


class Status(TypedDict):
    """`services` is empty while the daemon is `starting`. `loop_lag_ms` is the longest that its event loop stood still
    in the last ten seconds.
    """

    services: list[ServiceStatus]
    alarms: NotRequired[list[Alarm]]
    starting: NotRequired[bool]
    loop_lag_ms: NotRequired[float]


class BackendStats(TypedDict):
    name: str
    packets: int
    bytes: int
    new_flows: int


class ServiceStats(TypedDict):
    name: str
    packets: int
    bytes: int
    new_flows: int
    drops: dict[str, int]
    backends: list[BackendStats]


class Stats(TypedDict):
    """`drops`: of packets that never got as far as a service."""

    services: list[ServiceStats]
    drops: NotRequired[dict[str, int]]
    verdicts: dict[str, int]


class ServiceMoves(TypedDict):
    """`flows_broken` and `flows_on_removed` as of `Diff`, of this service."""

    name: str
    slots_moved_percent: float
    flows_broken: NotRequired[int | None]
    flows_on_removed: NotRequired[int]


class Diff(TypedDict):
    """`flows_broken`: live ones that lose their backend though it stays; null where some do and nobody knows how many.
    `flows_on_removed`: live ones, as far as they are remembered, whose backend or service goes; `uncounted`: what goes
    with others beside, as "service dns" or "backend web/a".
    """

    changes: list[Change]
    services: list[ServiceMoves]
    flows_broken: int | None
    flows_on_removed: NotRequired[int]
    uncounted: NotRequired[list[str]]


class SlotAnswer(TypedDict):
    """`previous` is the backend that had the slot before; flows that nobody remembers go there while `window_left_s`
    is not 0. Both are null where the slot is settled.
    """

    number: int
    of: int
    backend: str | None
    in_transition: bool
    previous: str | None
    window_left_s: int | None


class RememberedFlow(TypedDict):
    backend: str | None
    state: str
    idle_s: int
    fingerprint: str


class FlowWay(TypedDict):
    slot: SlotAnswer | None
    flow_cache: Literal["hit", "miss", "not asked"] | None
    remembered: RememberedFlow | None


class NewConnection(TypedDict):
    """`backend` is null where nobody can tell, or nobody serves."""

    backend: str | None
    why: str


class OuterHeaders(TypedDict):
    source: str
    destination: str
    ttl: int


class FrameHeaders(TypedDict):
    """`source_mac` is null where it is not known: the sender's."""

    source_mac: str | None
    destination_mac: str
    source: str
    destination: str
    ttl: int
    outer: OuterHeaders | None


class Explanation(FlowWay):
    """What is null does not apply: `new_connection` where a SYN would get the same, `before` and `after` where the
    packet is not changed, `egress` where it is not sent, `verdict` where that is to be seen. `reason` is one of
    trace.Reason.
    """

    source: str
    destination: str
    interface: str
    verdict: str | None
    service: str | None
    forward: str | None
    scheduler: str | None
    backend: str | None
    address: str | None
    reason: str
    why: str
    new_connection: NewConnection | None
    before: FrameHeaders | None
    after: FrameHeaders | None
    egress: str | None
    largest_packet: int | None


class Flow(TypedDict):
    """`slot` is the number within the service; `fingerprint` is all that the packet path keeps of the client."""

    service: str
    backend: str
    state: str
    idle_s: int
    slot: int
    fingerprint: str


class Flows(TypedDict):
    """`live` counts those of all services, `flows` are those that were asked for."""

    capacity: int
    live: int
    flows: list[Flow]
