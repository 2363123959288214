"""`xdplb explain`: where a flow's packet would go and why, told with names and in words. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from xdplb.abi import FlowState, ServiceFlag, Subject
from xdplb.api.messages import Explanation, FlowWay, FrameHeaders, NewConnection, RememberedFlow, SlotAnswer
from xdplb.core.status import BackendStatus
from xdplb.dataplane import frames
from xdplb.dataplane.frames import Endpoint, Flow
from xdplb.dataplane.trace import Reason, Trace
from xdplb.errors import UsageError, XdplbError
from xdplb.model import Admin, BackendKey, Config, Forward, HealthState, Protocol, Service
from xdplb.wording import listed

_EXAMPLE = "such as: xdplb explain 198.51.100.7:40000 203.0.113.10:80/tcp; IPv6 as [2001:db8::7]:40000"


@dataclass(frozen=True, slots=True)
class Known:
    """What the control plane knows of the ids in the maps, and how many seconds a tick is."""

    config: Config
    services: Mapping[int, str]
    backends: Mapping[int, BackendKey]
    statuses: Mapping[str, Mapping[str, BackendStatus]]
    tick_s: float

    def service(self, name: str) -> Service | None:
        return next((service for service in self.config.services if service.name == name), None)


def parse(source: str, destination: str) -> Flow:
    """SRC:PORT and VIP:PORT[/tcp|/udp], as the command line has them. UsageError."""
    rest, slash, name = destination.partition("/")
    if slash and name not in tuple(Protocol):
        raise UsageError(f"{destination!r}: {name!r} is neither tcp nor udp", _EXAMPLE)
    flow = Flow(_endpoint(source), _endpoint(rest), Protocol(name) if slash else Protocol.TCP)
    if flow.source.address.version != flow.destination.address.version:
        raise UsageError(f"{source} and {destination} are not of one family", _EXAMPLE)
    return flow


def _endpoint(text: str) -> Endpoint:
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise UsageError(f"{text!r} is not ADDRESS:PORT", _EXAMPLE) from None
    if bracketed is not (address.version == 6) or "%" in host:
        raise UsageError(f"{text!r} is not ADDRESS:PORT", _EXAMPLE)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UsageError(f"{text!r}: {port!r} is no port from 1 to 65535", _EXAMPLE)
    return Endpoint(address, int(port))


def answer(flow: Flow, trace: Trace, known: Known, interface: str, egress: str | None) -> Explanation:
    """The JSON of `xdplb explain -o json`: a packet of `flow` that arrives on `interface` and leaves by `egress`.

    XdplbError where the packet path has a service that the configuration does not.
    """
    story = _Story(flow, trace, known)
    service, key = story.service, known.backends.get(trace.backend)
    rewritten = trace.before != trace.after
    gue = service is not None and service.forward is Forward.GUE
    return {
        "source": str(flow.source),
        "destination": f"{flow.destination}/{flow.protocol}",
        "interface": interface,
        "verdict": None if trace.subject is Subject.TO_CHOOSE else trace.verdict,
        "service": service.name if service else None,
        "forward": service.forward.value if service else None,
        "scheduler": service.scheduler.value if service else None,
        **story.way(),
        "backend": key.backend if key else None,
        "address": story.address(),
        "reason": trace.reason.value,
        "why": story.why(),
        "new_connection": story.new_connection(),
        "before": _headers(trace.before) | {"source_mac": None} if rewritten else None,
        "after": _headers(trace.after, gue and trace.subject is not Subject.REPLY) if rewritten else None,
        "egress": egress,
        "largest_packet": trace.largest or None,
    }


def _headers(frame: bytes, gue: bool = False) -> FrameHeaders:
    headers = frames.read(frame, gue)
    outer = headers.outer
    return {
        "source_mac": headers.source_mac,
        "destination_mac": headers.destination_mac,
        "source": str(headers.source),
        "destination": str(headers.destination),
        "ttl": headers.ttl,
        "outer": None
        if outer is None
        else {
            "source": str(Endpoint(outer.source, outer.ports[0]) if outer.ports else outer.source),
            "destination": str(Endpoint(outer.destination, outer.ports[1]) if outer.ports else outer.destination),
            "ttl": outer.ttl,
        },
    }


class _Story:
    """One answer's names and sentences."""

    def __init__(self, flow: Flow, trace: Trace, known: Known) -> None:
        self._flow = flow
        self._trace = trace
        self._known = known
        self.service = known.service(known.services.get(trace.service, ""))
        if trace.service and self.service is None:
            raise XdplbError("the packet path has a service that the configuration does not", "xdplb reload")

    @property
    def _to_service(self) -> Service | None:
        return self.service if self._trace.subject not in (Subject.REPLY, Subject.MARTIAN, Subject.OWN) else None

    def way(self) -> FlowWay:
        """Slot and flow cache, where the packet is for a service."""
        trace, service = self._trace, self._to_service
        if service is None:
            return {"slot": None, "flow_cache": None, "remembered": None}
        slot: SlotAnswer = {
            "number": trace.slot,
            "of": trace.slots,
            "backend": self._name_or_none(trace.slot_backend),
            "in_transition": trace.in_transition,
            "previous": self._name_or_none(trace.previous) if trace.in_transition else None,
            "window_left_s": round(trace.ticks_left * self._known.tick_s) if trace.in_transition else None,
        }
        asked = not (trace.settled or trace.stateless)
        return {
            "slot": slot,
            "flow_cache": "not asked" if not asked else "hit" if trace.remembered else "miss",
            "remembered": self._remembered(),
        }

    def _remembered(self) -> RememberedFlow | None:
        memory = self._trace.memory
        if memory is None:
            return None
        return {
            "backend": self._name_or_none(int(memory.backend[0])),
            "state": FlowState(int(memory.state[0])).name.lower(),
            "idle_s": round(int(memory.idle[0]) * self._known.tick_s),
            "fingerprint": f"{int(memory.fingerprint[0]):08x}",
        }

    def address(self) -> str | None:
        """ADDRESS:PORT of the backend."""
        key = self._known.backends.get(self._trace.backend)
        if key is None or self.service is None:
            return None
        end = self._flow.source if self._trace.subject is Subject.REPLY else self._flow.destination
        addresses = {b.name: Endpoint(b.address, b.port or end.port) for b in self.service.backends}
        return str(addresses[key.backend]) if key.backend in addresses else None

    def new_connection(self) -> NewConnection | None:
        """What a SYN would get, where that differs. UDP has none, and a client that stays where it is none that counts:
        to both a new flow is like an old one. One on the ports of a flow that lives begins none.
        """
        trace, service = self._trace, self._to_service
        if service is None or self._flow.protocol is not Protocol.TCP:
            return None
        if trace.reason is Reason.REMEMBERED and trace.in_use:
            return None
        by_client = ServiceFlag.BY_CLIENT in trace.flags
        if by_client and (service.scheduler.hashes or trace.reason is Reason.REMEMBERED):
            return None
        if not trace.scheduled:
            return {"backend": None, "why": self._nobody_serves(service)} if trace.backend else None
        if not service.scheduler.hashes:
            return {"backend": None, "why": f"its backend is chosen at the SYN, by {service.scheduler}"}
        if trace.scheduled == trace.backend:
            return None
        why = self._belongs() if trace.scheduled == trace.slot_backend else self._hashed_again(trace.scheduled)
        return {"backend": self._name(trace.scheduled), "why": why}

    def why(self) -> str:
        service = self._to_service
        if service is None:
            return self._why_no_service()
        why = self._why(service)
        if service.forward is Forward.FULL_NAT and self._trace.reason is not Reason.MAPPED and self._trace.backend:
            why += "; its source becomes an address and port of ours when it comes"
        if (port := self._port_at_backend(service)) is not None:
            why += f"; another flow has its port there, so its source port becomes {port}"
        if self._trace.verdict == "pass" and self._trace.backend:
            why += "; the kernel sends it on, because that interface takes no frames from XDP"
        return why

    def _port_at_backend(self, service: Service) -> int | None:
        """The client's port as the NAT backend sees it, if that is another one."""
        if service.forward is not Forward.NAT or self._trace.before == self._trace.after:
            return None
        port = frames.read(self._trace.after).source.port
        return port if port != self._flow.source.port else None

    def _why(self, service: Service) -> str:
        trace = self._trace
        reason, name = trace.reason, self._name(trace.backend)
        if reason is Reason.MAPPED:
            return f"open: {name} knows it by the address and port that it has of ours"
        if reason is Reason.SETTLED:
            return self._belongs()
        if reason is Reason.REMEMBERED:
            return self._stays(service)
        if reason is Reason.NO_BACKEND:
            return self._nobody_serves(service)
        if reason is Reason.TO_CHOOSE:
            return self._forgotten() + f"not remembered: its backend is chosen when it comes, by {service.scheduler}"
        if reason is Reason.IN_USE:
            refused = "a reset" if self._flow.protocol is Protocol.TCP else "ICMP port unreachable"
            return f"other flows have {self._flow.source} and its other port at {name}: answered with {refused}"
        if reason is Reason.ORPHAN:
            return "its backend was removed from the service: answered with a reset (on_remove: reset)"
        if reason is Reason.PREVIOUS:
            return self._forgotten() + self._had_it_before()
        if reason is Reason.KEPT:
            return self._forgotten() + f"{name} {self._state(trace.backend)}, but keeps the flows that it has"
        if reason is Reason.CURRENT:
            return self._forgotten() + self._not_the_previous_one(service)
        return self._forgotten() + self._hashed_again(trace.backend)

    def _why_no_service(self) -> str:
        if self._trace.subject is Subject.REPLY:
            return self._reply()
        if self._trace.subject is Subject.OWN:
            return f"the backend's own, and no reply to a client of {self._services_of_port()}: the kernel gets it"
        if self._trace.subject is Subject.MARTIAN:
            return f"dropped: no client of a service has the address {self._flow.source.address}"
        if self._trace.subject is Subject.OTHER_PORT:
            return f"no service listens there (that address has {self._services_there()}): the kernel gets it"
        return f"no service has the address {self._flow.destination.address}: the kernel gets it"

    def _stays(self, service: Service) -> str:
        name = self._name(self._trace.backend)
        if ServiceFlag.BY_CLIENT in self._trace.flags:
            return f"remembered: this client stays with {name}"
        return f"remembered: {'' if service.remembers_all else 'since the pool changed '}this flow stays with {name}"

    def _belongs(self) -> str:
        owner = self._name(self._trace.slot_backend) if self._trace.slot_backend else "nobody"
        return f"slot {self._trace.slot} of {self._trace.slots} belongs to {owner}"

    def _had_it_before(self) -> str:
        trace, name, state = self._trace, self._name(self._trace.backend), self._state(self._trace.backend)
        had = f"{name} had the slot before" if state == "serves" else f"{name} {state}, but had the slot before"
        if trace.backend == trace.slot_backend:
            had = f"{name} had the slot before, and has it again"
        older = "flows older than the change" if self._flow.protocol is Protocol.TCP else "flows not remembered"
        return f"{had}: {older} stay with it, for {span(trace.ticks_left * self._known.tick_s)} more"

    def _not_the_previous_one(self, service: Service) -> str:
        trace, previous = self._trace, self._name_or_none(self._trace.previous)
        if trace.stateless:
            return f"{self._belongs()} (flows: none, so no flow stays with an earlier one)"
        if not trace.ticks_left:
            over = "not remembered" if service.remembers_all else "the time of flows older than the change is over"
            return f"{over}: {self._belongs()}"
        if previous is None:
            return f"the backend that had the slot before is gone: {self._belongs()}"
        return f"{previous} had the slot before, but {self._state(trace.previous)}: {self._belongs()}"

    def _hashed_again(self, to: int) -> str:
        owner = self._trace.slot_backend
        why = f", which {self._state(owner)}" if self._name_or_none(owner) else ""
        return f"{self._belongs()}{why}: hashed again, to {self._name(to)}"

    def _forgotten(self) -> str:
        """Of a flow that is remembered, but with a backend that takes nothing now."""
        memory = self._trace.memory
        if memory is None:
            return ""
        backend = int(memory.backend[0])
        name = self._name_or_none(backend)
        return f"remembered with {name or 'a backend'}, which {self._state(backend)}; "

    def _nobody_serves(self, service: Service) -> str:
        statuses = self._known.statuses.get(service.name, {})
        states = [f"{backend.name} {state_in_words(statuses.get(backend.name))}" for backend in service.backends]
        if ServiceFlag.REJECT not in self._trace.flags:
            what = "dropped"
        elif self._flow.protocol is Protocol.TCP:
            what = "answered with a reset"
        else:
            what = "answered with ICMP port unreachable"
        return f"no backend is up ({listed(states) or 'the service has none'}): {what}"

    def _services_there(self) -> str:
        there = [s for s in self._known.config.services if s.listen.address == self._flow.destination.address]
        there.sort(key=lambda service: (service.listen.first_port, service.listen.protocol))
        words = listed([f"{str(s.listen).rpartition(':')[2]} ({s.name})" for s in there])
        return f"services on ports {words}" if len(there) > 1 else f"a service on port {words}"

    def _services_of_port(self) -> str:
        key = self._known.backends.get(self._trace.backend)
        return key.service if key else "a service"

    def _reply(self) -> str:
        trace = self._trace
        of = f"a reply of {self._known.backends.get(trace.backend, 'a backend that is gone')}"
        if trace.before == trace.after:
            return f"{of}, but no route leads from here to {self._flow.destination.address}: the kernel gets it"
        translated = f"{of}: its source becomes {frames.read(trace.after).source}"
        if trace.verdict == "pass":
            return f"{translated}; the kernel sends it on: it has to find the next hop first, or XDP cannot send there"
        return translated

    def _name(self, backend: int) -> str:
        return self._name_or_none(backend) or "a backend that is gone"

    def _name_or_none(self, backend: int) -> str | None:
        key = self._known.backends.get(backend)
        return key.backend if key else None

    def _state(self, backend: int) -> str:
        key = self._known.backends.get(backend)
        return state_in_words(self._known.statuses.get(key.service, {}).get(key.backend) if key else None)


def state_in_words(status: BackendStatus | None) -> str:
    """What a backend does, as the end of a sentence about it."""
    if status is None:
        return "is gone"
    if status.standing is Admin.MAINT:
        return "is in maintenance"
    if status.health is not HealthState.UP:
        return "is down" if status.health is HealthState.DOWN else "has not been checked yet"
    if status.next_hop is None:
        return "has no next hop"
    return "drains" if status.standing is Admin.DRAIN else "serves"


def span(seconds: float) -> str:
    """In the largest unit of which there are two at least."""
    for length, unit in ((3600, "h"), (60, "m")):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{round(seconds)}s"
