"""Which XDP program runs on the interfaces of one instance: attached in place of nobody else's, and taken off again."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from xdplb.daemon.ledger import Ledger
from xdplb.daemon.network import Network
from xdplb.daemon.ports import Ports
from xdplb.daemon.upkeep import Difference
from xdplb.dataplane import syscall
from xdplb.errors import ForeignProgram, NotCapable, XdplbError
from xdplb.model import AttachMode
from xdplb.net.links import Attached, Attachment
from xdplb.net.next_hops import Interface
from xdplb.paths import Instance

_PROGRAMS = ("program", "program_new")
"""Pins of the program that is attached and, while one takes the place of another, of the new one."""


def own_programs(instance: Instance, ledger: Ledger) -> frozenset[int]:
    """The ids of what this instance attached last, or was about to attach. The kernel gives no id twice for long."""
    ids = set(ledger.programs)
    for name in _PROGRAMS:
        with suppress(OSError):
            descriptor = syscall.get(instance.pins / name)
            try:
                ids.add(syscall.program_id(descriptor))
            finally:
                os.close(descriptor)
    return frozenset(ids)


@dataclass(slots=True)
class _Wanted:
    """What is to run everywhere: the mode that was asked for, and by index the one that it came to."""

    descriptor: int
    id: int
    mode: AttachMode
    modes: dict[int, AttachMode]


class Attachments:
    """Every program is noted in the ledger before it is attached."""

    def __init__(self, network: Network, instance: Instance, ports: Ports, ledger: Ledger) -> None:
        self._network = network
        self._instance = instance
        self._ports = ports
        self._ledger = ledger
        self._before = own_programs(instance, ledger)
        self._wanted: _Wanted | None = None

    async def refuse_foreign(self, replace: bool) -> None:
        """Raises ForeignProgram where somebody else's program is on one of the interfaces, unless it may be
        replaced.
        """
        for interface in self._ports.all:
            current = await self._network.attached(interface.index)
            if current is not None and current.prog_id not in self._before and not replace:
                raise ForeignProgram(
                    f"{interface.name} runs an XDP program already (id {current.prog_id}), and it is not this xdplb's",
                    f"see whose it is: bpftool prog show id {current.prog_id}; take its place with --replace, "
                    f"or remove it: ip link set dev {interface.name} xdp off",
                )

    async def attach(self, program: int, mode: AttachMode, replace: bool) -> dict[str, Attachment]:
        """Attaches to all interfaces that are there, atomically in place of our own earlier program. Returns how, by
        interface.

        Where one of them refuses, the others get back what they had.
        """
        ours = own_programs(self._instance, self._ledger)
        interfaces = self._ports.present or self._ports.all
        pinned, fresh = (self._instance.pins / name for name in _PROGRAMS)
        fresh.unlink(missing_ok=True)
        syscall.pin(program, fresh)
        self._ledger.programs = [syscall.program_id(program), *sorted(ours)]
        self._ledger.save()
        before: dict[str, int | None] = {}
        done: dict[str, Attachment] = {}
        try:
            for interface in interfaces:
                current = await self._network.attached(interface.index)
                previous = before[interface.name] = syscall.program_by_id(current.prog_id) if current else None
                own = current is not None and current.prog_id in ours
                done[interface.name] = await self._attach_one(interface, program, mode, previous, own, replace)
        except XdplbError:
            for interface in interfaces:
                if interface.name in done:
                    await self._put_back(interface, program, before[interface.name])
            fresh.unlink()
            self._ledger.programs = sorted(ours)
            raise
        finally:
            for descriptor in filter(None, before.values()):
                os.close(descriptor)
        fresh.replace(pinned)
        self._ledger.programs = self._ledger.programs[:1]
        self._want(program, mode, {interface.index: done[interface.name].mode for interface in interfaces})
        return done

    def _want(self, program: int, mode: AttachMode, modes: dict[int, AttachMode]) -> None:
        """From now on this one is to run everywhere. The descriptor is ours: the caller may close its own."""
        if self._wanted is not None:
            os.close(self._wanted.descriptor)
        self._wanted = _Wanted(os.dup(program), syscall.program_id(program), mode, modes)

    def close(self) -> None:
        if self._wanted is not None:
            os.close(self._wanted.descriptor)
            self._wanted = None

    def differences(self) -> list[Difference]:
        """By the ports' latest look."""
        wanted = self._wanted
        if wanted is None:
            return []
        found = []
        for port in self._ports.present:
            current = self._ports.programs[port.index]
            mode = wanted.modes.get(port.index)
            if current is None:
                found.append(_missing(port, partial(self._mend, port, wanted, None)))
            elif current.prog_id != wanted.id and current.prog_id not in self._before:
                found.append(_foreign(port, current.prog_id))
            elif current.prog_id != wanted.id or (mode is not None and current.mode is not mode):
                found.append(_other(port, current, mode, partial(self._mend, port, wanted, current)))
        return found

    async def _mend(self, port: Interface, wanted: _Wanted, current: Attached | None) -> None:
        if current is None:
            attachment = await self._network.attach(port.index, wanted.descriptor, wanted.mode)
        else:
            attachment = await self._network.replace(port.index, wanted.descriptor, wanted.mode)
        wanted.modes[port.index] = attachment.mode

    async def _attach_one(
        self, interface: Interface, program: int, mode: AttachMode, previous: int | None, own: bool, replace: bool
    ) -> Attachment:
        if own:
            return await self._network.attach(interface.index, program, mode, expected_fd=previous)
        if previous is not None and replace:
            return await self._network.replace(interface.index, program, mode)
        return await self._network.attach(interface.index, program, mode)  # says whose it is, where there is one

    async def _put_back(self, interface: Interface, program: int, previous: int | None) -> None:
        with suppress(XdplbError):
            if previous is None:
                await self._network.detach(interface.index, expected_fd=program)
            else:
                await self._network.attach(interface.index, previous, expected_fd=program)

    async def leave_other_interfaces(self) -> list[str]:
        """Takes our programs off interfaces that an earlier run had and this one does not. A line for each."""
        return await detach_all(self._network, self._before, {interface.index for interface in self._ports.all})


def _missing(port: Interface, mend: Callable[[], Awaitable[object]]) -> Difference:
    return Difference(
        "program-missing",
        port.name,
        f"no XDP program runs on {port.name}, so that nothing is balanced there",
        f"it is attached again by itself; look who takes it off: bpftool net show dev {port.name}",
        mend,
        f"{port.name} ran no XDP program: attached again",
    )


def _foreign(port: Interface, program: int) -> Difference:
    return Difference(
        "program-foreign",
        port.name,
        f"another XDP program runs on {port.name} (id {program}), so that nothing is balanced there",
        f"see whose it is: bpftool prog show id {program}; once it is gone, xdplb attaches again: "
        f"ip link set dev {port.name} xdp off",
    )


def _other(
    port: Interface, current: Attached, mode: AttachMode | None, mend: Callable[[], Awaitable[object]]
) -> Difference:
    return Difference(
        "program-replaced",
        port.name,
        f"{port.name} runs program {current.prog_id} in {current.mode} mode, not the latest in {mode or 'any'} mode",
        f"it is attached again by itself; look who changes it: bpftool net show dev {port.name}",
        mend,
        f"{port.name} ran an earlier program, or in another mode: attached again",
    )


async def detach_all(network: Network, ours: frozenset[int], kept: set[int]) -> list[str]:
    """Detaches our programs from all interfaces but `kept`. A line for each."""
    return [
        f"detached from {interface.name}"
        for interface in await network.interfaces()
        if interface.index not in kept and await _detach(network, interface, ours)
    ]


async def _detach(network: Network, interface: Interface, ours: frozenset[int]) -> bool:
    try:
        current = await network.attached(interface.index)
    except NotCapable:  # gone in the meantime
        return False
    if current is None or current.prog_id not in ours:
        return False
    previous = syscall.program_by_id(current.prog_id)
    try:
        return await network.detach(interface.index, expected_fd=previous)
    finally:
        os.close(previous)
