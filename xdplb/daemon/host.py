"""What xdplb changes about its host, beside the maps: attached programs, service addresses, kernel settings.

Every change is noted in the manifest before the next one is made, so that `undo` finds all of them after a kill as
well.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from xdplb.dataplane import loader, manifest, syscall
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import ForeignProgram, NotCapable, XdplbError
from xdplb.model import Address, AttachMode, Config
from xdplb.net.links import Attachment, Links
from xdplb.net.next_hops import Interface
from xdplb.net.offloads import disable_receive_aggregation, restore_receive_aggregation
from xdplb.net.sysctl import Sysctls
from xdplb.paths import Instance, instances

log = logging.getLogger(__name__)

_LOOSE_REVERSE_PATH = "2"
_INHERITED = "inherited_sysctls.json"
"""What settings of the whole host were before another instance, gone by now, changed them."""


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


class Gateway:
    """The host of one instance. `interfaces[0]` faces the clients and carries the service addresses."""

    def __init__(self, links: Links, instance: Instance, interfaces: Sequence[Interface], notes: Manifest) -> None:
        self._links = links
        self._instance = instance
        self._interfaces = interfaces
        self._notes = notes
        self._sysctls = Sysctls()
        self._before = own_programs(instance, notes)

    async def refuse_foreign(self, replace: bool) -> None:
        """Raises ForeignProgram where somebody else's program is on one of the interfaces, unless it may be
        replaced.
        """
        for interface in self._interfaces:
            current = await self._links.attached(interface.index)
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
        self._save()
        before: dict[str, int | None] = {}
        done: dict[str, Attachment] = {}
        try:
            for interface in self._interfaces:
                current = await self._links.attached(interface.index)
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
        for interface in self._interfaces:
            if done[interface.name].mode is AttachMode.GENERIC:
                self._stop_aggregation(interface)
        return done

    async def _attach_one(
        self, interface: Interface, program: int, mode: AttachMode, previous: int | None, own: bool, replace: bool
    ) -> Attachment:
        if own:
            return await self._links.attach(interface.index, program, mode, expected_fd=previous)
        if previous is not None and replace:
            return await self._links.replace(interface.index, program, mode)
        return await self._links.attach(interface.index, program, mode)  # says whose it is, where there is one

    async def _put_back(self, interface: Interface, program: int, previous: int | None) -> None:
        with suppress(XdplbError):
            if previous is None:
                await self._links.detach(interface.index, expected_fd=program)
            else:
                await self._links.attach(interface.index, previous, expected_fd=program)

    def _stop_aggregation(self, interface: Interface) -> None:
        changed = disable_receive_aggregation(interface.name)
        if changed:
            self._notes.aggregation[interface.name] = sorted(
                {*changed, *self._notes.aggregation.get(interface.name, ())}
            )
            self._save()
            log.info(
                "%s: turned %s off: in generic mode XDP would see merged packets", interface.name, ", ".join(changed)
            )

    def prepare(self, config: Config) -> None:
        """Kernel settings that the configuration needs: NAT has the kernel route what XDP cannot send itself."""
        for version in (4, 6):
            nat = any(s.forward.translates and s.listen.address.version == version for s in config.services)
            if nat:
                (self._prepare_ipv4 if version == 4 else self._prepare_ipv6)()

    def _prepare_ipv4(self) -> None:
        for interface in self._interfaces:
            base = f"net/ipv4/conf/{interface.name}"
            self._set(f"{base}/forwarding", "1")
            self._set(f"{base}/accept_local", "1")
            strict = "1" in (self._sysctls.get("net/ipv4/conf/all/rp_filter"), self._sysctls.get(f"{base}/rp_filter"))
            if strict:
                self._set(f"{base}/rp_filter", _LOOSE_REVERSE_PATH)

    def _prepare_ipv6(self) -> None:
        everywhere = "net/ipv6/conf/all/forwarding"
        if self._sysctls.get(everywhere) != "1":
            self._keep_what_forwarding_everywhere_changes()
            self._set(everywhere, "1")
        for interface in self._interfaces:
            self._set(f"net/ipv6/conf/{interface.name}/forwarding", "1")

    def _keep_what_forwarding_everywhere_changes(self) -> None:
        for directory in sorted(Path("/proc/sys/net/ipv6/conf").iterdir()):
            base = f"net/ipv6/conf/{directory.name}"
            if directory.name == "all":
                continue
            if self._sysctls.get(f"{base}/forwarding") == "1":
                self._notes.sysctls.setdefault(f"{base}/forwarding", "1")  # to be put back after `all` was
            if directory.name != "default" and self._sysctls.get(f"{base}/accept_ra") == "1":
                self._set(f"{base}/accept_ra", "2")  # or a forwarding host would lose its own default route

    def _set(self, path: str, value: str) -> None:
        before = self._sysctls.get(path)
        if before != value:
            self._notes.sysctls.setdefault(path, before)
            self._save()
            self._sysctls.set(path, value)
            log.info("set %s=%s, for nat", path.replace("/", "."), value)

    async def add_addresses(self, config: Config) -> None:
        """Gives the host the service addresses, and those that full NAT sends from, that it does not have yet."""
        client_side, backend_side = self._interfaces[0], self._interfaces[-1]
        present = await self._links.addresses()
        wanted = [(client_side, address) for address in _listened(config)]
        wanted += [(backend_side, address) for address in config.sources(4) + config.sources(6)]
        missing = [(interface, address) for interface, address in wanted if address not in present]
        notes = [[interface.name, str(address)] for interface, address in missing]
        self._notes.addresses += [note for note in notes if note not in self._notes.addresses]
        self._save()
        for interface, address in missing:
            await self._links.add_address(interface.index, address, present)

    async def leave_other_interfaces(self) -> None:
        """Takes our programs off interfaces that an earlier run had and this one does not."""
        kept = {interface.name for interface in self._interfaces}
        for line in await _detach_all(self._links, self._before, kept):
            log.info("%s", line)

    def _save(self) -> None:
        self._notes.save(self._instance.manifest)

    async def remove_addresses(self, config: Config | None) -> None:
        """Takes back those that we gave and that `config` (None: nobody) does not need any more."""
        wanted = {str(a) for a in (*_listened(config), *config.sources(4), *config.sources(6))} if config else set()
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
    try:
        notes = manifest.load(instance.manifest)
    except XdplbError as error:
        log.warning("%s", error.message)
        notes = None
    ours = own_programs(instance, notes)
    done = await _detach_all(links, ours, set())
    if notes is not None:
        gateway = Gateway(links, instance, [], notes)
        done += [f"removed {address} from {name}" for name, address in notes.addresses]
        await gateway.remove_addresses(None)
        _restore_sysctls(instance, notes)
        for name, changed in notes.aggregation.items():
            with suppress(XdplbError, OSError):
                restore_receive_aggregation(name, changed)
    for neighbour in await links.neighbours():
        if neighbour.ours and ours:
            await links.release(neighbour)
    if instance.pins.exists():
        done.append(f"removed the maps pinned in {instance.pins}")
    loader.remove_pins(instance.pins)
    shutil.rmtree(instance.runtime, ignore_errors=True)
    for parent in (instance.pins.parent, instance.runtime.parent):
        with suppress(OSError):
            parent.rmdir()
    return done


def _restore_sysctls(instance: Instance, notes: Manifest) -> None:
    """Puts back what we changed. While another instance runs, it inherits this duty for settings of the whole host."""
    before = {**notes.sysctls, **_inherited(instance)}
    heir = next((other for other in instances() if other != instance and other.manifest.exists()), None)
    if heir is not None:
        shared = {path: value for path, value in before.items() if path.split("/")[3] not in notes.interfaces}
        before = {path: value for path, value in before.items() if path not in shared}
        (heir.runtime / _INHERITED).write_text(json.dumps({**_inherited(heir), **shared}), encoding="utf-8")
    sysctls = Sysctls()
    sysctls.adopt(before)
    sysctls.restore()


def _inherited(instance: Instance) -> dict[str, str]:
    try:
        return dict(json.loads((instance.runtime / _INHERITED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


async def _detach_all(links: Links, ours: frozenset[int], kept: set[str]) -> list[str]:
    """Detaches our programs from all interfaces but `kept`. A line for each."""
    return [
        f"detached from {interface.name}"
        for interface in await links.interfaces()
        if interface.name not in kept and await _detach(links, interface, ours)
    ]


async def _detach(links: Links, interface: Interface, ours: frozenset[int]) -> bool:
    try:
        current = await links.attached(interface.index)
    except NotCapable:  # gone in the meantime
        return False
    if current is None or current.prog_id not in ours:
        return False
    previous = syscall.program_by_id(current.prog_id)
    try:
        return await links.detach(interface.index, expected_fd=previous)
    finally:
        os.close(previous)
