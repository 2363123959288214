"""What xdplb wants of its host, beside the maps: kept so while it runs, undone at the end.

    interfaces  each that was named, wherever it went                                       ports.py
    programs    on each of them                                                             attachments.py
    addresses   of services and of the source pool, where the host does not have them       addresses.py
    probes      the veth pair of checks through services' addresses                         probe_link.py
    settings    nat, full-nat: forwarding, accept_local, rp_filter; generic mode: GRO, LRO  kernel_settings.py
    neighbours  entries of backends, kept resolved                                          net/next_hop_watcher.py
    interfaces  what they are like, told to the packet path                                 known_links.py
    files       pins on bpffs, the instance's directory below /run                          paths.py

Every change is noted in the ledger before it is made, so that `undo` finds all of them after a kill as well.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from xdplb.daemon import kernel_settings, ledger
from xdplb.daemon.addresses import Addresses
from xdplb.daemon.alarms import Alarms
from xdplb.daemon.attachments import Attachments, detach_all, own_programs
from xdplb.daemon.kernel_settings import KernelSettings
from xdplb.daemon.known_links import KnownLinks, Told
from xdplb.daemon.ledger import Ledger
from xdplb.daemon.network import Network
from xdplb.daemon.ports import Ports
from xdplb.daemon.probe_link import Ends, ProbeLink, device_of
from xdplb.daemon.surroundings import Surroundings
from xdplb.daemon.upkeep import Difference, Patience
from xdplb.dataplane import loader
from xdplb.errors import XdplbError
from xdplb.model import AttachMode, Config, HostUpkeep
from xdplb.net.next_hops import Interface
from xdplb.net.sysctl import Sysctls
from xdplb.paths import Instance

log = logging.getLogger(__name__)

DEBOUNCE_S = 0.05
LOOK_AT_MOST_EVERY_S = 0.2
LOOK_AT_LINKS_AT_MOST_EVERY_S = 0.01


class Host:
    """The host of one instance. The first interface faces the clients and carries the service addresses.

    Level-triggered: `reconcile` compares what is wanted with what is, whatever happened in between. What differs is
    mended, or an alarm until it is gone.
    """

    def __init__(
        self,
        network: Network,
        instance: Instance,
        interfaces: Sequence[Interface],
        alarms: Alarms,
        *,
        sysctls: Sysctls | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_probe_link: Callable[[Ends], None] = lambda ends: None,
        told: Told | None = None,
    ) -> None:
        """`told` hears of interfaces. Raises XdplbError where what an earlier run noted cannot be read."""
        self._network = network
        self._instance = instance
        self._alarms = alarms
        self._ledger = ledger.load(instance)
        self._ledger.namespace = ledger.this_namespace()
        self._ports = Ports(network, interfaces, self._ledger)
        self._programs = Attachments(network, instance, self._ports, self._ledger)
        self._addresses = Addresses(network, self._ports, self._ledger, alarms)
        self._settings = KernelSettings(self._ports, self._ledger, sysctls or Sysctls())
        device = device_of(interfaces[0])
        self._probe_link = ProbeLink(network, device, self._ledger, sysctls or Sysctls(), on_probe_link)
        self._known_links = KnownLinks(network, self._ports, told)
        self._surroundings = Surroundings(network, self._ports, self._known_links)
        self._patience = Patience(clock)
        self._config: Config | None = None
        self._raised: set[tuple[str, str]] = set()
        self._waiting: list[tuple[str, str]] = []
        self._changing = asyncio.Lock()
        self._look = asyncio.Event()
        self._links_changed = asyncio.Event()

    @property
    def interfaces(self) -> Sequence[Interface]:
        """As they are now, in the order in which they were named."""
        return self._ports.all

    async def refuse_foreign(self, replace: bool) -> None:
        """Raises ForeignProgram where an interface runs somebody else's program, unless that may be replaced."""
        await self._programs.refuse_foreign(replace)

    async def prepare(self, config: Config) -> None:
        """Makes the settings that `config` needs."""
        async with self._changing:
            await self._ports.look()
            self._ledger.know(self._ports.all)
            await self._settings.prepare(config)

    async def attach(self, program: int, mode: AttachMode, replace: bool) -> None:
        """Attaches to all interfaces; where one refuses, the others get back what they had."""
        async with self._changing:
            await self._ports.look()
            await self._known_links.look()
            done = await self._programs.attach(program, mode, replace)
            for interface in self._ports.present:
                attachment = done[interface.name]
                if attachment.mode is AttachMode.GENERIC:
                    self._settings.stop_aggregation(interface)
                why = f": no native XDP here ({attachment.fallback})" if attachment.fallback else ""
                log.info("%s: attached in %s mode%s", interface.name, attachment.mode, why)
            await self._ports.look()
            await self._known_links.look()

    async def add_addresses(self, config: Config) -> None:
        """Gives this host the addresses that `config` needs and it lacks. XdplbError where one is refused."""
        async with self._changing:
            self._ledger.absorb(self._instance)
            await self._addresses.add(config)

    async def lead_probes(self, config: Config, program: int) -> Ends | None:
        """The interfaces of checks through services' addresses, with their program. None without such checks."""
        async with self._changing:
            return await self._probe_link.make(config, program)

    async def release(self, config: Config) -> None:
        """Takes back what `config` does not need, and keeps the host as `config` needs it from now on.

        What cannot be taken back is said in the log, and left to `down`.
        """
        async with self._changing:
            self._config = config
            try:
                await self._addresses.remove(config)
            except XdplbError as error:
                log.warning("%s", error.message)
        self.look_soon()

    async def leave_other_interfaces(self) -> None:
        """Takes our programs off interfaces that an earlier run had and this one does not."""
        for line in await self._programs.leave_other_interfaces():
            log.info("%s", line)

    def look_soon(self) -> None:
        """Something may have changed."""
        self._look.set()

    async def run(self) -> None:
        """Keeps the host as it should be, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen())
                tasks.create_task(self._keep())
                tasks.create_task(self._follow_links())
                tasks.create_task(self._listen_to_frames())
        finally:
            self._addresses.close()
            self._programs.close()
            self._probe_link.close()

    async def _listen(self) -> None:
        with self._network.host_changes() as changes:
            async for _ in changes:
                self._look.set()
                self._links_changed.set()

    async def _follow_links(self) -> None:
        """At once: until the packet path knows of a new MAC address, the kernel gets the frames to it, and resets."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._upkeep.interval_s):
                    await self._links_changed.wait()
            self._links_changed.clear()
            await self._known_links.look()
            await asyncio.sleep(LOOK_AT_LINKS_AT_MOST_EVERY_S)

    async def _listen_to_frames(self) -> None:
        while True:
            if self._config is not None:
                await self._surroundings.listen()
                self.look_soon()
            await asyncio.sleep(self._upkeep.interval_s)

    async def _keep(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._next_look_s()):
                    await self._look.wait()
            await asyncio.sleep(DEBOUNCE_S)
            self._look.clear()
            try:
                await self.reconcile()
            except (XdplbError, OSError) as error:
                fix = getattr(error, "hint", "")
                self._alarms.raise_("host-unknown", f"this host could not be looked at: {error}", fix)
            else:
                self._alarms.clear("host-unknown")
            await asyncio.sleep(LOOK_AT_MOST_EVERY_S)

    def _next_look_s(self) -> float:
        waiting = self._patience.next_s(self._waiting)
        return self._upkeep.interval_s if waiting is None else min(self._upkeep.interval_s, waiting)

    @property
    def _upkeep(self) -> HostUpkeep:
        return self._config.host if self._config else HostUpkeep()

    async def reconcile(self) -> None:
        """Looks at all, and mends what differs. Cheap where nothing does."""
        async with self._changing:
            config = self._config
            if config is None:
                return
            self._ledger.absorb(self._instance)
            found = await self._ports.look()
            await self._known_links.look()
            found += self._programs.differences()
            found += self._surroundings.differences()
            found += self._settings.aggregating()
            self._settings.forwards_tunnels = self._known_links.forwards_tunnels()
            found += await self._settings.differences(config)
            found += await self._addresses.differences(config)
            found += await self._probe_link.differences()
            self._addresses.announce_again(config)
            told = [difference for difference in found if not await self._mended(difference)]
            self._tell(told)
            await self._addresses.look_at_owners(config)

    async def _mended(self, difference: Difference) -> bool:
        if difference.mend is None or self._patience.wait_s(difference.key):
            return False
        self._patience.tried(difference.key)
        try:
            await difference.mend()
        except (XdplbError, OSError) as error:
            log.debug("%s: %s", difference.about, error)
            return False
        log.warning("%s", difference.mended)
        return True

    def _tell(self, differences: list[Difference]) -> None:
        """Alarms for these, and for what flaps; the others are over."""
        self._waiting = [difference.key for difference in differences if difference.mend is not None]
        flapping = self._patience.flapping()
        now = set()
        for difference in differences:
            often = flapping.get(difference.key)
            text = difference.text + (f" (mended {often} times within a minute)" if often else "")
            self._alarms.raise_(difference.alarm, text, difference.fix, difference.about)
            now.add(difference.key)
        now |= self._raised & flapping.keys()
        for key in self._raised - now:
            self._alarms.clear(*key)
        self._raised = now


async def undo(network: Network, instance: Instance, sysctls: Sysctls | None = None) -> list[str]:
    """Removes whatever an instance left on this host. Idempotent; returns what was done, a line each."""
    notes = _noted(instance)
    interfaces = await network.interfaces()
    notes.brought_up_to(interfaces)
    ours = own_programs(instance, notes)
    done = await detach_all(network, ours, set())
    done += [_left_on(name) for name in notes.interfaces if name not in {interface.name for interface in interfaces}]
    notes.absorb(instance)
    done += notes.bequeath(instance)
    done += [f"removed {address} from {name}" for name, address in notes.addresses]
    await Addresses(network, Ports(network, [], notes), notes, Alarms()).remove(None)
    if notes.probe_link and await network.remove_interface(notes.probe_link):
        done.append(f"removed {notes.probe_link}")
    kernel_settings.restore(notes, sysctls or Sysctls())
    if not ledger.others(instance, notes.namespace):  # the last one gives back what all of them kept
        await network.release([neighbour for neighbour in await network.neighbours() if neighbour.ours])
    if instance.pins.exists():
        done.append(f"removed the maps pinned in {instance.pins}")
    loader.remove_pins(instance.pins)
    shutil.rmtree(instance.runtime, ignore_errors=True)
    for parent in (instance.pins.parent, instance.runtime.parent):
        with suppress(OSError):
            parent.rmdir()
    return done


def _left_on(name: str) -> str:
    return (
        f"{name} is gone; where it was moved to another network namespace, xdplb's program is still on it: "
        f"ip -n NAMESPACE link set dev {name} xdp off"
    )


def _noted(instance: Instance) -> Ledger:
    try:
        return ledger.load(instance)
    except XdplbError as error:
        log.warning("%s", error.message)
        return Ledger(instance.ledger)
