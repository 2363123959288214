"""A loaded packet path and its model, side by side: steps in, complaints out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

import numpy as np
from packets import BACK_MAC, BEHIND_ROUTER, CLIENT, CLIENT_MAC, FRONT_MAC, ROUTER, ROUTER_MAC
from reference import Hash, aged
from world import NARROW, OWN, UNREACHABLE

from fuzz.flows import ESTABLISHED
from fuzz.gateway import NO_ROUTE, Front, Gateway, Route, Server
from fuzz.model import DROP, OTHERS, PASS, REDIRECT, TX, VERDICTS, Expected, Filling, Model, Seen
from fuzz.wire import MAPPED, Packet, faults
from fuzz.worlds import KERNEL, SMALL, config
from xdplb.abi import COPIES, FIRST_SOURCE_PORT, SETS_PER_SOURCE, BackendFlag, FlowTimes
from xdplb.core import link_facts, requirements
from xdplb.core.hash_key import HashKey
from xdplb.core.nat_replies import shared_backends
from xdplb.core.operations import Applied
from xdplb.core.status import BackendStatus, NextHop, Statuses
from xdplb.daemon.engine import Engine, Retired
from xdplb.dataplane import loader, syscall
from xdplb.dataplane.clock import clock
from xdplb.dataplane.loader import Dataplane
from xdplb.dataplane.tunnel_map import TunnelMap
from xdplb.model import Address, Admin, BackendKey, Forward, HealthState, Protocol

KEY = HashKey.derive("fuzz")
HASH = Hash(KEY.seed, KEY.factor)
MTU, SMALL_MTU = 1500, 1300
WINDOW = 900
TIMES = FlowTimes(opening=60, established=900, closing=120, datagram=300, reuse=60, budget=1 << 30, tick_shift=40)
"""Time stands still until a step lets it pass."""
ANSWERS = ("rejected", "too_big", "ports_in_use")
"""Rules after which the packet path answered."""
FRONT_SIDE, BACK_SIDE = "front", "back"
LARGEST = 3400
"""The largest frame that a test run takes."""

SYN_RECORDS = 256
"""So few that one often takes another's place."""

_ORDER = b"\x88\xb5"
"""The type of a frame whose copies become fragments."""
_BATCH_TAKE = 25
_TEST_RUN = 10


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a sequence: a frame that arrives (front, back), time that passes (age), that routers' reports about
    tunnels are heeded (heed), that others have all of full NAT's ports (fill), or a change of a backend.
    """

    what: str
    argument: bytes = b""

    def __str__(self) -> str:
        shown = self.argument.hex() if self.what in (FRONT_SIDE, BACK_SIDE) else self.argument.decode()
        return f"{self.what} {shown}".rstrip()

    @classmethod
    def parse(cls, line: str) -> Step:
        what, _, rest = line.partition(" ")
        return cls(what, bytes.fromhex(rest) if what in (FRONT_SIDE, BACK_SIDE) else rest.encode())


@dataclass(slots=True)
class Result:
    """Of a step: what happened, what should have, and by which rule."""

    seen: Seen
    expected: Expected
    rule: str


class Runner:
    """Test runs with everything allocated once: some microseconds each."""

    def __init__(self, program: int, fetch: int = 4096) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True).syscall
        self._number = syscall._SYSCALL[os.uname().machine]
        self._in, self._out = ctypes.create_string_buffer(fetch), ctypes.create_string_buffer(fetch)
        self._context = syscall._XdpContext()
        self._run = syscall._TestRun(
            prog_fd=program,
            data_in=ctypes.addressof(self._in),
            data_out=ctypes.addressof(self._out),
            repeat=1,
            ctx_in=ctypes.addressof(self._context),
            ctx_size_in=ctypes.sizeof(self._context),
        )
        self._room = fetch
        self._reference = ctypes.byref(self._run)
        self._size = ctypes.sizeof(self._run)
        self._addresses = ctypes.addressof(self._in), ctypes.addressof(self._out)

    def __call__(self, frame: bytes, ifindex: int) -> Seen:
        run, length = self._run, len(frame)
        ctypes.memmove(self._addresses[0], frame, length)
        self._context.data_end = length
        self._context.ingress_ifindex = ifindex
        run.data_size_in = length
        run.data_size_out = self._room
        while self._libc(self._number, _TEST_RUN, self._reference, self._size) < 0:
            code = ctypes.get_errno()
            if code not in (4, 11):
                raise OSError(code, f"{os.strerror(code)}: a test run of {length} bytes")
        return Seen(run.retval, ctypes.string_at(self._addresses[1], run.data_size_out))


class HashMap:
    """A hash map that is read and emptied by one call."""

    def __init__(self, descriptor: int) -> None:
        shape = syscall.map_shape(descriptor)
        self._sizes = shape.key_size, shape.value_size
        self._keys = ctypes.create_string_buffer(shape.max_entries * shape.key_size)
        self._values = ctypes.create_string_buffer(shape.max_entries * shape.value_size)
        self._position = ctypes.create_string_buffer(max(shape.key_size, 8))
        self._room, self._descriptor = shape.max_entries, descriptor

    def take(self) -> list[tuple[bytes, bytes]]:
        """All that was in it."""
        places = (ctypes.addressof(buffer) for buffer in (self._position, self._keys, self._values))
        batch = syscall._Batch(0, *places, self._room, self._descriptor, 0, 0)
        with contextlib.suppress(FileNotFoundError):  # which says only that the end was reached
            syscall._bpf(_BATCH_TAKE, batch)
        key, value = self._sizes
        keys = ctypes.string_at(self._keys, batch.count * key)
        values = ctypes.string_at(self._values, batch.count * value)
        return [(keys[n * key :][:key], values[n * value :][:value]) for n in range(batch.count)]


class Arena:
    """One world. Every sequence begins with the same gateway, which knows nothing of any packet."""

    def __init__(self, name: str, plane: Dataplane, interfaces: Mapping[str, int]) -> None:
        self.name = name
        self.plane = plane
        self.interfaces = interfaces
        self.config = config(name)
        self.clock = clock(TIMES.tick_shift)
        seconds = WINDOW * (1 << TIMES.tick_shift) / self.clock.frequency
        self.config = replace(self.config, flow_cache=replace(self.config.flow_cache, window_s=seconds))
        self.engine = Engine(plane, KEY, self.config, Statuses(), Applied(plane.geometry), Retired(), self.clock)
        for service in self.config.services:
            for number, backend in enumerate(service.backends):
                self._begin(BackendKey(service.name, backend.name), number)
        self.engine.apply_all()
        self.run, self.run_copy = Runner(plane.program_fd), Runner(plane.probe_fd)
        plane.copy_to(interfaces[FRONT_SIDE])
        self.tunnels = TunnelMap(plane)
        self._fragments = HashMap(plane.fd("fragments"))
        self._answers = [
            np.frombuffer(syscall.map_memory(plane.fd(name)), np.uint64) for name in ("answer_budgets", "answer_totals")
        ]
        tuples = np.frombuffer(syscall.map_memory(plane.fd("snat_tuples")), np.uint64)
        self._tuples = tuples[: 3 * plane.snat_words.size].reshape(-1, 3)
        self.gateway = self._gateway()
        self.model = Model(self.gateway, HASH, SYN_RECORDS, self._counted_more, self._mapped_at)
        self._sources = [bytes(a.packed) for version in (4, 6) for a in self.config.sources(version)]
        self._keep()
        self._before = self._counters()
        self.frames = 0
        self._sent: set[bytes] = set()

    def _begin(self, key: BackendKey, number: int) -> None:
        service = next(s for s in self.config.services if s.name == key.service)
        backend = next(b for b in service.backends if b.name == key.backend)
        place = self.config.services.index(service)
        behind = BACK_SIDE if place % 3 == 0 else FRONT_SIDE
        hop = NextHop(
            ifindex=self.interfaces[behind],
            source_mac=_mac(BACK_MAC if behind == BACK_SIDE else FRONT_MAC),
            dest_mac=bytes((2, 0xBB, 0, 0, place, number)),
            source=ip_address(OWN[backend.address.version]),
            mtu=SMALL_MTU if SMALL in service.name else MTU,
            by_kernel=KERNEL in service.name,
        )
        down = "down" in service.name
        state = HealthState.DOWN if down else HealthState.UP
        self.engine.update(key, BackendStatus(state, Admin.ACTIVE, None, None if "open" in service.name else hop))

    # The gateway's first state, and the way back to it.

    def _keep(self) -> None:
        """What control plane and maps are like before anything happens."""
        plane = self.plane
        self._memories = [
            plane.slots,
            plane.transitions.view(np.uint8),
            plane.backends.raw,
            plane.services.raw,
            plane.loads.view(np.uint8),
        ]
        self._kept = [memory.copy() for memory in self._memories]
        self._applied, self._statuses = self.engine.applied.copy(), self.engine.statuses.copy()
        self._changed = False
        counts = [front.id for front in self.gateway.fronts.values() if front.counts]
        self._counting = [struct.pack("<I", id_) for id_ in counts]

    def start(self) -> None:
        """As in the beginning."""
        plane = self.plane
        if self._changed:
            for memory, kept in zip(self._memories, self._kept, strict=True):
                memory[:] = kept
            self.engine.applied, self.engine.statuses = self._applied.copy(), self._statuses.copy()
            self.engine.adopt_config(self.config)
            self._changed = False
            self._refresh_all()
            for server in self.gateway.servers.values():
                server.mtu = server.link_mtu
        for end in self._ends:
            if end.packed in self.model.reports or self.tunnels.report(end):
                self.tunnels.enter(end, ip_address(OWN[end.version]), 0, None)
        self.model.forget()
        self.model.flows.tick = self.model.nat.tick = 0
        self._forget()
        plane.loads["active"][: max(self.gateway.servers) + 1] = 0
        zero = bytes(8) * syscall.possible_cpus()
        for key in self._counting:
            syscall.update(plane.fd("wrr_positions"), key, zero)
        self._sent.clear()
        self._before = self._counters()

    def _forget(self) -> None:
        plane = self.plane
        plane.flow_words[np.flatnonzero(plane.flow_words)] = 0
        plane.nat_words[np.flatnonzero(plane.nat_words)] = 0
        plane.nat_hints[:] = 0
        plane.syn_records["tag"] = 0
        if self._sources:
            words = plane.snat_words
            words[np.flatnonzero(words)] = 0
        self._fragments.take()

    # Steps.

    def step(self, step: Step) -> Result | None:
        """Carries out one; what came of it if it was a frame."""
        if step.what in (FRONT_SIDE, BACK_SIDE):
            self.frames += 1
            ifindex = self.interfaces[step.what]
            seen = self.run(step.argument, ifindex)
            if seen.verdict == REDIRECT and seen.frame[12:14] == _ORDER:
                seen.pieces = self._cut(seen.frame)
            result = Result(seen, self.model.judge(step.argument, ifindex, seen), self.model.rule)
            if result.rule in ANSWERS:
                self._grant_answers()
            return result
        if step.what == "age":
            self._age(int(step.argument))
        elif step.what == "fill":
            self._fill(step.argument == b"answered")
        elif step.what == "heed":
            self._changed = True
            self._learn_mtus()
        else:
            self._change(step.what, BackendKey(*step.argument.decode().rsplit("/", 1)))
        return None

    def _grant_answers(self) -> None:
        """How many there may be is a matter of real time, and not judged here."""
        for memory in self._answers:
            memory[:] = 0

    def _cut(self, order: bytes) -> list[bytes]:
        """What the copies of a packet become at the other end."""
        copies = [self.run_copy(order, self.interfaces[FRONT_SIDE]) for _ in range(COPIES)]
        return [copy.frame for copy in copies if copy.verdict != DROP]

    def _fill(self, answered: bool) -> None:
        """Others have all of full NAT's places: only at the beginning."""
        words = self.plane.snat_words
        word = 1 << 32 | answered << 31 | OTHERS << 14 | (self.clock.tick & 0xFFF) << 2 | ESTABLISHED
        words[:] = word
        self.model.filling = Filling(self.model.flows.tick, answered, words.size)

    def _mapped_at(self, front: Front, p: Packet) -> tuple[bytes, int] | None:
        wire = p.source if p.version == 6 else MAPPED + p.source
        wire += b"".join(port.to_bytes(2, "big") for port in p.ports) + struct.pack("<I", front.id)
        *address, flow = np.frombuffer(wire, np.uint64)
        for place in np.flatnonzero(self._tuples[:, 2] == flow):
            if (
                self._tuples[place, :2].tolist() == address
                and 0 < int(self.plane.snat_words.flat[place]) >> 14 & 0x1FFFF < OTHERS
            ):
                source, port = divmod(int(place), 8 * SETS_PER_SOURCE)
                return self.gateway.pool[source], FIRST_SOURCE_PORT + port
        return None

    def _learn_mtus(self) -> None:
        """Reports in the map become the backends' MTUs; and in the model what should have been reported."""
        services = set()
        for end in self._ends:
            report = self.tunnels.report(end)
            mtu = report.mtu if report and report.holds(self.clock.tick) else None
            for key in self._ends[end]:
                status = self.engine.statuses.get(key)
                if status.path_mtu != mtu:
                    self.engine.update(key, replace(status, path_mtu=mtu))
                    services.add(key.service)
        for service in services:
            self.engine.apply_service(service)
            self._refresh(self.engine.applied.services[service].id)
        for server in self.gateway.servers.values():
            report = self.model.known_report(server.address) if server.address in self.gateway.tunnels else None
            server.mtu = min(server.link_mtu, report.mtu if report else server.link_mtu)

    def _age(self, ticks: int) -> None:
        """Everything that is dated becomes so much older."""
        for end in self._ends:
            if report := self.tunnels.report(end):
                older = replace(report, tick=report.tick - ticks & 0xFFFFFFFF)
                self.tunnels.enter(end, ip_address(OWN[end.version]), 0, older)
        deadlines = self.plane.transitions["deadline"].astype(np.int64) - ticks
        self.plane.transitions["deadline"] = np.maximum(deadlines, 0)
        self.model.nat.tick += ticks
        for words in (self.plane.flow_words, self.plane.nat_words, *([self.plane.snat_words] if self._sources else [])):
            used = np.flatnonzero(words)
            words[used] = aged(words[used], ticks)
        self.model.flows.tick += ticks
        self._changed = True

    def _change(self, what: str, key: BackendKey) -> None:
        """fail: only the flag, as at the first moment; settle: the slots follow. The others do both."""
        if not self._changed:
            self._changed = True
        status = self.engine.statuses.get(key)
        if what == "fail":
            self.engine.update(key, replace(status, health=HealthState.DOWN))
            self.engine.withdraw(key)
        elif what == "recover":
            self.engine.update(key, replace(status, health=HealthState.UP))
        elif what in ("drain", "ready"):
            self.engine.update(key, replace(status, admin=Admin.DRAIN if what == "drain" else Admin.ACTIVE))
        elif what != "settle":
            raise ValueError(f"no such step: {what}")
        if what != "fail":
            self.engine.apply_service(key.service)
        self._refresh(self.engine.applied.services[key.service].id)

    # What the control plane says, for the model.

    def _gateway(self) -> Gateway:
        gateway, applied = Gateway(), self.engine.applied
        shared = shared_backends(self.config)
        self._ends: dict[Address, list[BackendKey]] = {}
        for service in self.config.services:
            id_ = applied.services[service.name].id
            front = Front(id_, service, service.listen.address.packed, service.listen.protocol.number)
            gateway.fronts[id_] = front
            gateway.listening.setdefault(front.address, []).append(front)
            for backend in service.backends:
                key = BackendKey(service.name, backend.name)
                number, entry = applied.backends[key]
                server = Server(
                    number,
                    f"{service.name}/{backend.name}",
                    id_,
                    backend.address.packed,
                    backend.port,
                    bytes(entry.macs[:6]),
                    bytes(entry.macs[6:]),
                    entry.ifindex,
                    entry.kernel_mtu or entry.mtu,
                    entry.kernel_mtu or entry.mtu,
                    KERNEL in service.name,
                    service.forward is Forward.NAT and (key in shared or service.listen.protocol is Protocol.UDP),
                )
                gateway.servers[number] = front.servers[number] = server
                if service.forward.encapsulates:
                    gateway.tunnels.add(server.address)
                    self._ends.setdefault(backend.address, []).append(key)
                if service.forward is Forward.NAT:
                    gateway.answering.setdefault(server.address, []).append(server)
        for servers in gateway.answering.values():
            servers.sort(key=lambda server: server.id)
        gateway.pool = [a.packed for version in (4, 6) for a in self.config.sources(version)]
        gateway.macs = {
            self.interfaces[side]: frozenset({_mac(mac)})
            for side, mac in ((FRONT_SIDE, FRONT_MAC), (BACK_SIDE, BACK_MAC))
        }
        facts = {index: link_facts.LinkFacts(macs) for index, macs in gateway.macs.items()}
        link_facts.write(self.plane.links, facts)
        gateway.tunnel_sources = {version: ip_address(OWN[version]).packed for version in (4, 6)}
        for end in self._ends:
            self.tunnels.enter(end, ip_address(OWN[end.version]), 0, None)
        self._routes(gateway)
        self.gateway = gateway
        self._tables: dict[int, tuple[int, ...]] = {}
        self._refresh_all(gateway)
        return gateway

    def _routes(self, gateway: Gateway) -> None:
        """Those of world.set_up_interfaces. A network's lowest address is one like any other, since Linux 5.14."""
        front, back = self.interfaces[FRONT_SIDE], self.interfaces[BACK_SIDE]
        own = _mac(FRONT_MAC)
        for version in (4, 6):
            router = Route("send", front, _mac(ROUTER_MAC), own)
            gateway.hosts[ip_address(CLIENT[version]).packed] = Route("send", front, _mac(CLIENT_MAC), own)
            gateway.hosts[ip_address(ROUTER[version]).packed] = router
            gateway.hosts[ip_address(BEHIND_ROUTER[version]).packed] = router
            gateway.hosts[ip_address(NARROW[version]).packed] = replace(router, mtu=1280)
            gateway.hosts[ip_address(UNREACHABLE[version]).packed] = NO_ROUTE
            gateway.hosts[ip_address(OWN[version]).packed] = NO_ROUTE
        for own_address in ("192.0.2.1", "192.0.2.255", "2001:db8:c::1", "2001:db8:c::"):
            gateway.hosts[ip_address(own_address).packed] = NO_ROUTE
        for own_address in ("10.0.255.255", "fd00:1::"):
            gateway.hosts[ip_address(own_address).packed] = NO_ROUTE
        gateway.networks = [
            (ip_address("192.0.2.0").packed[:3], Route("neighbour", front)),
            (ip_address("10.0.0.0").packed[:2], Route("neighbour", back)),
            (ip_address("2001:db8:c::").packed[:8], Route("neighbour", front)),
            (ip_address("fd00:1::").packed[:8], Route("neighbour", back)),
        ]

    def _refresh_all(self, gateway: Gateway | None = None) -> None:
        for front in (gateway or self.gateway).fronts.values():
            front.slots, front.transitions = [], {}
            self._refresh(front.id)

    def _refresh(self, service: int) -> None:
        front = self.gateway.fronts[service]
        for server in front.servers.values():
            _, entry = self.engine.applied.backends[BackendKey(*server.name.rsplit("/", 1))]
            server.up = bool(entry.flags & BackendFlag.UP)
            server.keeps = bool(entry.flags & BackendFlag.KEEP)
            server.weight = entry.load_weight
        table = self.engine.applied.services[front.config.name].table
        if front.slots:
            front.turn(table.tolist(), self.model.flows.tick, WINDOW)
        else:
            front.slots = table.tolist()

    def _counted_more(self, front: Front) -> Server | None:
        known, loads = self.model.flows.active(), self.plane.loads["active"]
        return next((server for id_, server in front.servers.items() if loads[id_] > known[id_]), None)

    # Judging.

    def complaints(self, step: Step, result: Result) -> list[str]:
        """What is wrong about one packet's way."""
        seen, expected, frame = result.seen, result.expected, step.argument
        found = []
        if seen.verdict != expected.verdict:
            verdicts = VERDICTS[seen.verdict], VERDICTS[expected.verdict]
            found.append(f"verdict {verdicts[0]}, and not {verdicts[1]} ({result.rule})")
        elif seen.frame != expected.frame:
            found.append(f"other bytes ({result.rule}):\n{_difference(seen.frame, expected.frame)}")
        elif len(seen.pieces) != len(expected.pieces):
            found.append(f"{len(seen.pieces)} pieces, and not {len(expected.pieces)} ({result.rule})")
        for is_, should in zip(seen.pieces, expected.pieces, strict=False):
            if is_ != should:
                found.append(f"other bytes of a piece ({result.rule}):\n{_difference(is_, should)}")
        if seen.verdict not in (DROP, PASS, TX, REDIRECT):
            found.append(f"aborted, or no verdict at all: {seen.verdict}")
        if seen.verdict in (TX, REDIRECT):
            packet = self.model.packet
            if packet is None or packet.broken:
                found.append("what is malformed was sent on")
            if frame in self._sent:
                found.append("forwarded twice")
            if result.rule.startswith("to backend"):
                self._sent.add(seen.frame)
        if seen.frame != frame and seen.verdict in (PASS, TX, REDIRECT):
            for left in seen.pieces or [seen.frame]:
                if (wrong := faults(left)) and not faults(frame):
                    found.append(f"what came in was right, what leaves has wrong: {', '.join(wrong)}")
            is_answer = seen.verdict == TX and seen.frame[:6] == frame[6:12]
            if is_answer and len(seen.frame) > 3 * len(frame):
                found.append(f"an answer of {len(seen.frame)} bytes to {len(frame)}")
        return found

    def final_complaints(self) -> list[str]:
        """What counters and memories should be after a sequence, and are not."""
        after = self._counters()
        counted = Counter({name: n - self._before.get(name, 0) for name, n in after.items()})
        found = _unequal("counter", +counted, +self.model.counters)
        model, plane = self.model, self.plane
        words = plane.flow_words[np.flatnonzero(plane.flow_words)]
        states = Counter((int(w) >> 14 & 0x1FFFF, int(w) & 3, self._idle(w)) for w in words)
        found += _unequal("remembered (backend, state, idle)", states, model.flows.states())
        last = max(self.gateway.servers) + 1
        loads = plane.loads["active"][:last]
        active = Counter({int(n): int(loads[n]) for n in np.flatnonzero(loads)})
        found += _unequal("active flows of backend", active, model.flows.active())
        fragments = {
            (_address(k[:16]), _address(k[16:32]), k[32:36], k[36]): struct.unpack("<II", v)
            for k, v in self._fragments.take()
        }
        wanted = {
            (s, d, ident.ljust(4, b"\0"), protocol): (server, int(reply))
            for (s, d, ident, protocol), (server, reply) in model.fragments.items()
        }
        found += _unequal("fragments", fragments, wanted)
        words = plane.nat_words[np.flatnonzero(plane.nat_words)]
        nat = Counter((int(w) >> 14 & 0x1FFFF, bool(int(w) >> 31 & 1), int(w) & 3, self._idle(w)) for w in words)
        found += _unequal("NAT flows (owner, moved, state, idle)", nat, model.nat.states())
        looked_at = {int(n): 1 for n in np.flatnonzero(plane.nat_hints["looks"])}
        found += _unequal("looked at", looked_at, dict.fromkeys(model.nat.looked_at, 1))
        if self._sources:
            words = plane.snat_words[np.flatnonzero(plane.snat_words)]
            states = Counter()
            for w, n in zip(*np.unique(words, return_counts=True), strict=True):
                states[int(w) >> 14 & 0x1FFFF, int(w) & 3, bool(int(w) >> 31 & 1), self._idle(w)] += int(n)
            found += _unequal("mappings (backend, state, answered, idle)", states, model.mapped_states())
        reports = {end.packed: self.tunnels.report(end) for end in self._ends}
        known = {
            end: (report.mtu, self.clock.tick - report.tick & 0xFFFFFFFF) for end, report in reports.items() if report
        }
        wanted_reports = {end: (report.mtu, model.flows.tick - report.tick) for end, report in model.reports.items()}
        found += _unequal("reports (mtu, age)", known, wanted_reports)
        return found

    def _idle(self, word: np.uint64) -> int:
        """For how many ticks a flow has been silent, by its word."""
        return (self.clock.tick - (int(word) >> 2)) & 0xFFF

    def _counters(self) -> dict[str, int]:
        plane, found = self.plane, {}
        for map_name, label, last in (
            ("verdict_counters", "verdict.{1}", 0),
            ("drop_counters", "drop.{0}.{1}", max(self.gateway.fronts)),
            ("backend_counters", "backend.{0}.{1}", max(self.gateway.servers)),
            ("flow_counters", "flow.{1}", 0),
        ):
            fields, values = plane.counter_fields(map_name), plane.read_counters(map_name, last + 1)
            for row, column in zip(*np.nonzero(values), strict=True):
                found[label.format(row, fields[column])] = int(values[row, column])
        return found

    # Whole sequences.

    def play(self, steps: Sequence[Step]) -> list[str]:
        """All complaints about a sequence."""
        self.start()
        found = []
        for number, step in enumerate(steps):
            result = self.step(step)
            if result:
                found += [f"step {number}: {complaint}" for complaint in self.complaints(step, result)]
        return found + self.final_complaints()


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _address(wire: bytes) -> bytes:
    return wire[12:] if wire.startswith(bytes(10) + b"\xff\xff") else wire


def _unequal(what: str, seen: Mapping[object, object], wanted: Mapping[object, object]) -> list[str]:
    keys = {**seen, **wanted}
    return [
        f"{what} {key}: {seen.get(key)}, and not {wanted.get(key)}" for key in keys if seen.get(key) != wanted.get(key)
    ]


def _difference(seen: bytes, wanted: bytes) -> str:
    at = next((n for n, (a, b) in enumerate(zip(seen, wanted, strict=False)) if a != b), min(len(seen), len(wanted)))
    start = max(0, at - 8)
    return (
        f"  from byte {at} on, of {len(seen)} and {len(wanted)} bytes:\n"
        f"  is     {seen[start : at + 40].hex(' ')}\n  should {wanted[start : at + 40].hex(' ')}"
    )


@contextlib.contextmanager
def opened(name: str, interfaces: Mapping[str, int], pins: os.PathLike[str]) -> Iterator[Arena]:
    """A world with a program specialised to it, gone afterwards."""
    wanted = config(name)
    features = requirements.features(wanted, tx_by_redirect=False, times=TIMES)
    geometry = replace(
        requirements.geometry(wanted),
        services=256,
        nat_sets=4096,
        fragments=4096,
        flow_sets=4096,
        syn_records=SYN_RECORDS,
    )
    plane = loader.open_dataplane(features, geometry, KEY, pins)  # type: ignore[arg-type]
    try:
        yield Arena(name, plane, interfaces)
    finally:
        plane.close()
        plane.unpin()
