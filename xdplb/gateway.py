"""What xdplb changes about its host, beside the maps: attached programs, service addresses, kernel settings.

Every change is noted in the manifest before the next one is made, so that `undo` finds all of them after a kill as
well.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from xdplb import bpfsys, dataplane, manifest
from xdplb.errors import ForeignProgram, XdplbError
from xdplb.links import Attached, Attachment, Links
from xdplb.manifest import Manifest
from xdplb.model import Address, AttachMode, Config, Forward
from xdplb.nexthops import Interface
from xdplb.offloads import disable_receive_aggregation, restore_receive_aggregation
from xdplb.paths import Instance
from xdplb.sysctl import Sysctls

log = logging.getLogger(__name__)

_LOOSE_REVERSE_PATH = "2"


def _pinned_program(instance: Instance) -> Path:
    return instance.pins / "program"


def own_program(instance: Instance) -> int | None:
    """The id of the program that this instance attached last, or None."""
    try:
        descriptor = bpfsys.get(_pinned_program(instance))
    except OSError:
        return None
    try:
        return bpfsys.program_id(descriptor)
    finally:
        os.close(descriptor)


class Gateway:
    """The host of one instance. `interfaces[0]` faces the clients and carries the service addresses."""

    def __init__(self, links: Links, instance: Instance, interfaces: Sequence[Interface], notes: Manifest) -> None:
        self._links = links
        self._instance = instance
        self._interfaces = interfaces
        self._notes = notes
        self._sysctls = Sysctls()
        self._sysctls.adopt(notes.sysctls)

    async def refuse_foreign(self, replace: bool) -> None:
        """Raises ForeignProgram where somebody else's program is on one of the interfaces, unless it may be
        replaced.
        """
        for interface in self._interfaces:
            current = await self._links.attached(interface.index)
            if current is not None and current.prog_id != own_program(self._instance) and not replace:
                raise ForeignProgram(
                    f"{interface.name} runs an XDP program already (id {current.prog_id}), and it is not this xdplb's",
                    f"see whose it is: bpftool prog show id {current.prog_id}; take its place with --replace, "
                    f"or remove it: ip link set dev {interface.name} xdp off",
                )

    async def attach(self, program: int, mode: AttachMode, replace: bool) -> dict[str, Attachment]:
        """Attaches to all interfaces, atomically in place of our own earlier program. Returns how, by interface."""
        ours = own_program(self._instance)
        done = {}
        for interface in self._interfaces:
            current = await self._links.attached(interface.index)
            done[interface.name] = await self._attach_one(interface, current, program, mode, replace, ours)
            if done[interface.name].mode is AttachMode.GENERIC:
                self._stop_aggregation(interface)
        self._pin(program)
        return done

    async def _attach_one(
        self,
        interface: Interface,
        current: Attached | None,
        program: int,
        mode: AttachMode,
        replace: bool,
        ours: int | None,
    ) -> Attachment:
        if current is None:
            return await self._links.attach(interface.index, program, mode)
        if current.prog_id == ours:
            previous = bpfsys.program_by_id(current.prog_id)
            try:
                return await self._links.attach(interface.index, program, mode, expected_fd=previous)
            finally:
                os.close(previous)
        if replace:
            return await self._links.replace(interface.index, program, mode)
        return await self._links.attach(interface.index, program, mode)  # says whose it is

    def _pin(self, program: int) -> None:
        path = _pinned_program(self._instance)
        fresh = path.with_name("program_new")
        with suppress(FileNotFoundError):
            fresh.unlink()
        bpfsys.pin(program, fresh)
        fresh.replace(path)

    def _stop_aggregation(self, interface: Interface) -> None:
        changed = disable_receive_aggregation(interface.name)
        if changed:
            self._notes.aggregation[interface.name] = sorted(
                {*changed, *self._notes.aggregation.get(interface.name, ())}
            )
            log.info(
                "%s: turned %s off: in generic mode XDP would see merged packets", interface.name, ", ".join(changed)
            )

    def prepare(self, config: Config) -> None:
        """Kernel settings that the configuration needs: NAT has the kernel route what XDP cannot send itself."""
        for version in (4, 6):
            nat = any(s.forward is Forward.NAT and s.listen.address.version == version for s in config.services)
            if nat:
                (self._prepare_ipv4 if version == 4 else self._prepare_ipv6)()
        self._notes.sysctls = self._sysctls.before

    def _prepare_ipv4(self) -> None:
        for interface in self._interfaces:
            base = f"net/ipv4/conf/{interface.name}"
            self._set(f"{base}/forwarding", "1")
            self._set(f"{base}/accept_local", "1")
            strict = "1" in (self._sysctls.get("net/ipv4/conf/all/rp_filter"), self._sysctls.get(f"{base}/rp_filter"))
            if strict:
                self._set(f"{base}/rp_filter", _LOOSE_REVERSE_PATH)

    def _prepare_ipv6(self) -> None:
        for directory in sorted(Path("/proc/sys/net/ipv6/conf").iterdir()):
            base = f"net/ipv6/conf/{directory.name}"
            if directory.name not in ("all", "default") and self._sysctls.get(f"{base}/accept_ra") == "1":
                self._set(f"{base}/accept_ra", "2")  # or a forwarding host would lose its own default route
        self._set("net/ipv6/conf/all/forwarding", "1")

    def _set(self, path: str, value: str) -> None:
        if self._sysctls.set(path, value):
            log.info("set %s=%s, for nat", path.replace("/", "."), value)

    async def add_addresses(self, config: Config) -> None:
        """Gives the host the service addresses that it does not have yet."""
        client_side = self._interfaces[0]
        for address in _listened(config):
            if await self._links.add_address(client_side.index, address):
                self._notes.addresses.append([client_side.name, str(address)])
                self._notes.save(self._instance.manifest)

    async def remove_addresses(self, config: Config | None) -> None:
        """Takes back those that we gave and that `config` (None: nobody) does not need any more."""
        wanted = set(map(str, _listened(config))) if config else set()
        for name, address in list(self._notes.addresses):
            if address in wanted:
                continue
            with suppress(XdplbError):
                interface = await self._links.interface(name)
                await self._links.remove_address(interface.index, ip_address(address))
            self._notes.addresses.remove([name, address])


def _listened(config: Config) -> list[Address]:
    return list(dict.fromkeys(service.listen.address for service in config.services))


async def undo(links: Links, instance: Instance) -> list[str]:
    """Removes whatever an instance left on this host. Idempotent; returns what was done, a line each."""
    done: list[str] = []
    try:
        notes = manifest.load(instance.manifest)
    except XdplbError as error:
        log.warning("%s", error.message)
        notes = None
    interfaces = notes.interfaces if notes else [instance.name]
    ours = own_program(instance)
    for name in interfaces:
        done += await _detach(links, name, ours)
    if notes is not None:
        gateway = Gateway(links, instance, [], notes)
        done += [f"removed {address} from {name}" for name, address in notes.addresses]
        await gateway.remove_addresses(None)
        sysctls = Sysctls()
        sysctls.adopt(notes.sysctls)
        sysctls.restore()
        for name, changed in notes.aggregation.items():
            with suppress(XdplbError, OSError):
                restore_receive_aggregation(name, changed)
    for neighbour in await links.neighbours():
        if neighbour.ours and ours is not None:
            await links.release(neighbour)
    if instance.pins.exists():
        done.append(f"removed the maps pinned in {instance.pins}")
    dataplane.remove_pins(instance.pins)
    shutil.rmtree(instance.runtime, ignore_errors=True)
    return done


async def _detach(links: Links, name: str, ours: int | None) -> list[str]:
    try:
        interface = await links.interface(name)
        current = await links.attached(interface.index)
    except XdplbError:
        return []
    if current is None or current.prog_id != ours:
        return []
    previous = bpfsys.program_by_id(current.prog_id)
    try:
        await links.detach(interface.index, expected_fd=previous)
    finally:
        os.close(previous)
    return [f"detached from {name}"]
