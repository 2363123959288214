"""Which XDP program runs on the interfaces of one instance: attached in place of nobody else's, and taken off again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from xdplb.daemon.network import Network
from xdplb.dataplane import syscall
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import ForeignProgram, NotCapable, XdplbError
from xdplb.model import AttachMode
from xdplb.net.links import Attachment
from xdplb.net.next_hops import Interface
from xdplb.paths import Instance

_PROGRAMS = ("program", "program_new")
"""Pins of the program that is attached and, while one takes the place of another, of the new one."""


def own_programs(instance: Instance, notes: Manifest | None) -> frozenset[int]:
    """The ids of what this instance attached last, or was about to attach. The kernel gives no id twice for long."""
    ids = set(notes.programs) if notes else set()
    for name in _PROGRAMS:
        with suppress(OSError):
            descriptor = syscall.get(instance.pins / name)
            try:
                ids.add(syscall.program_id(descriptor))
            finally:
                os.close(descriptor)
    return frozenset(ids)


class Attachments:
    """Every program is noted in the manifest before it is attached."""

    def __init__(self, network: Network, instance: Instance, interfaces: Sequence[Interface], notes: Manifest) -> None:
        self._network = network
        self._instance = instance
        self._interfaces = interfaces
        self._notes = notes
        self._before = own_programs(instance, notes)

    async def refuse_foreign(self, replace: bool) -> None:
        """Raises ForeignProgram where somebody else's program is on one of the interfaces, unless it may be
        replaced.
        """
        for interface in self._interfaces:
            current = await self._network.attached(interface.index)
            if current is not None and current.prog_id not in self._before and not replace:
                raise ForeignProgram(
                    f"{interface.name} runs an XDP program already (id {current.prog_id}), and it is not this xdplb's",
                    f"see whose it is: bpftool prog show id {current.prog_id}; take its place with --replace, "
                    f"or remove it: ip link set dev {interface.name} xdp off",
                )

    async def attach(self, program: int, mode: AttachMode, replace: bool) -> dict[str, Attachment]:
        """Attaches to all interfaces, atomically in place of our own earlier program. Returns how, by interface.

        Where one of them refuses, the others get back what they had.
        """
        ours = own_programs(self._instance, self._notes)
        pinned, fresh = (self._instance.pins / name for name in _PROGRAMS)
        fresh.unlink(missing_ok=True)
        syscall.pin(program, fresh)
        self._notes.programs = [syscall.program_id(program), *sorted(ours)]
        self._notes.save(self._instance.manifest)
        before: dict[str, int | None] = {}
        done: dict[str, Attachment] = {}
        try:
            for interface in self._interfaces:
                current = await self._network.attached(interface.index)
                previous = before[interface.name] = syscall.program_by_id(current.prog_id) if current else None
                own = current is not None and current.prog_id in ours
                done[interface.name] = await self._attach_one(interface, program, mode, previous, own, replace)
        except XdplbError:
            for interface in self._interfaces:
                if interface.name in done:
                    await self._put_back(interface, program, before[interface.name])
            fresh.unlink()
            self._notes.programs = sorted(ours)
            raise
        finally:
            for descriptor in filter(None, before.values()):
                os.close(descriptor)
        fresh.replace(pinned)
        self._notes.programs = self._notes.programs[:1]
        return done

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
        return await detach_all(self._network, self._before, {interface.name for interface in self._interfaces})


async def detach_all(network: Network, ours: frozenset[int], kept: set[str]) -> list[str]:
    """Detaches our programs from all interfaces but `kept`. A line for each."""
    return [
        f"detached from {interface.name}"
        for interface in await network.interfaces()
        if interface.name not in kept and await _detach(network, interface, ours)
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
