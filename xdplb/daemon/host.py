"""What `xdplb up` changes about its host, beside the maps; `down` undoes all of it.

    programs    on each interface that was named                                            attachments.py
    addresses   of services and of the source pool, where the host does not have them       addresses.py
    settings    nat, full-nat: forwarding, accept_local, rp_filter; generic mode: GRO, LRO  kernel_settings.py
    neighbours  entries of backends, kept resolved                                          net/next_hop_watcher.py
    files       pins on bpffs, the instance's directory below /run                          paths.py

Every change is noted in the manifest before it is made, so that `undo` finds all of them after a kill as well.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress

from xdplb.daemon import kernel_settings
from xdplb.daemon.addresses import Addresses
from xdplb.daemon.attachments import Attachments, detach_all, own_programs
from xdplb.daemon.kernel_settings import KernelSettings
from xdplb.daemon.network import Network
from xdplb.dataplane import loader, manifest
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import XdplbError
from xdplb.model import AttachMode, Config
from xdplb.net.next_hops import Interface
from xdplb.paths import Instance

log = logging.getLogger(__name__)


class Host:
    """The host of one instance. `interfaces[0]` faces the clients and carries the service addresses."""

    def __init__(self, network: Network, instance: Instance, interfaces: Sequence[Interface], notes: Manifest) -> None:
        self._interfaces = interfaces
        self._programs = Attachments(network, instance, interfaces, notes)
        self._addresses = Addresses(network, instance, interfaces, notes)
        self._settings = KernelSettings(instance, interfaces, notes)

    async def refuse_foreign(self, replace: bool) -> None:
        """Raises ForeignProgram where an interface runs somebody else's program, unless that may be replaced."""
        await self._programs.refuse_foreign(replace)

    def prepare(self, config: Config) -> None:
        """Makes the settings that `config` needs."""
        self._settings.prepare(config)

    async def attach(self, program: int, mode: AttachMode, replace: bool) -> None:
        """Attaches to all interfaces; where one refuses, the others get back what they had."""
        done = await self._programs.attach(program, mode, replace)
        for interface in self._interfaces:
            attachment = done[interface.name]
            if attachment.mode is AttachMode.GENERIC:
                self._settings.stop_aggregation(interface)
            why = f": no native XDP here ({attachment.fallback})" if attachment.fallback else ""
            log.info("%s: attached in %s mode%s", interface.name, attachment.mode, why)

    async def add_addresses(self, config: Config) -> None:
        """Gives this host the addresses that `config` needs and it lacks. XdplbError where one is refused."""
        await self._addresses.add(config)

    async def release(self, config: Config) -> None:
        """Takes back what `config` does not need. What cannot be taken back is said in the log, and left to `down`."""
        try:
            await self._addresses.remove(config)
        except XdplbError as error:
            log.warning("%s", error.message)

    async def leave_other_interfaces(self) -> None:
        """Takes our programs off interfaces that an earlier run had and this one does not."""
        for line in await self._programs.leave_other_interfaces():
            log.info("%s", line)


async def undo(network: Network, instance: Instance) -> list[str]:
    """Removes whatever an instance left on this host. Idempotent; returns what was done, a line each."""
    try:
        notes = manifest.load(instance.manifest)
    except XdplbError as error:
        log.warning("%s", error.message)
        notes = None
    ours = own_programs(instance, notes)
    done = await detach_all(network, ours, set())
    if notes is not None:
        done += [f"removed {address} from {name}" for name, address in notes.addresses]
        await Addresses(network, instance, [], notes).remove(None)
        kernel_settings.restore(instance, notes)
    for neighbour in await network.neighbours():
        if neighbour.ours and ours:
            await network.release(neighbour)
    if instance.pins.exists():
        done.append(f"removed the maps pinned in {instance.pins}")
    loader.remove_pins(instance.pins)
    shutil.rmtree(instance.runtime, ignore_errors=True)
    for parent in (instance.pins.parent, instance.runtime.parent):
        with suppress(OSError):
            parent.rmdir()
    return done
