"""Kernel settings that a configuration needs: set with what was there before noted, kept so, and put back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from xdplb.daemon.ledger import Ledger
from xdplb.daemon.ports import Ports
from xdplb.daemon.upkeep import Difference, together
from xdplb.errors import XdplbError
from xdplb.model import AttachMode, Config, Upkeep
from xdplb.net import offloads
from xdplb.net.next_hops import Interface
from xdplb.net.sysctl import Sysctls

log = logging.getLogger(__name__)

_LOOSE_REVERSE_PATH = "2"
_EVERYWHERE = "net/ipv6/conf/all/forwarding"


class KernelSettings:
    """Every change is noted in the ledger before it is made. The kernel routes what XDP cannot send itself. With NAT
    there is always something; with tunnels only if an interface takes no frames of XDP.
    """

    forwards_tunnels = False

    def __init__(self, ports: Ports, ledger: Ledger, sysctls: Sysctls) -> None:
        self._ports = ports
        self._ledger = ledger
        self._sysctls = sysctls

    async def prepare(self, config: Config) -> None:
        """Makes the settings that `config` needs."""
        if config.host.settings is Upkeep.MEND:
            await asyncio.to_thread(self._prepare, config)

    def _prepare(self, config: Config) -> None:
        for path, value, _ in self._wrong(config):
            self._set(path, value)
            log.info("set %s=%s, for %s", path.replace("/", "."), value, self._what_for)

    async def differences(self, config: Config) -> list[Difference]:
        mending = config.host.settings is Upkeep.MEND
        wrong = await asyncio.to_thread(lambda: list(self._wrong(config)))
        found = [
            Difference(
                "setting-changed",
                path.replace("/", "."),
                f"{path.replace('/', '.')} is {now}, and {self._what_for} needs {value}",
                f"sysctl -w {path.replace('/', '.')}={value}",
                partial(asyncio.to_thread, self._set, path, value) if mending else None,
                f"{path.replace('/', '.')} was {now}: set to {value} again",
            )
            for path, value, now in wrong
        ]
        return together(found, "", f"settings are not as {self._what_for} needs them")

    @property
    def _what_for(self) -> str:
        return "forwarding" if self.forwards_tunnels else "nat"

    def _wrong(self, config: Config) -> Iterator[tuple[str, str, str]]:
        """(path, what it should be, what it is), in the order in which they are to be set."""
        for path, value in self._wanted(config):
            now = self._sysctls.get(path)
            if now != value:
                yield path, value, now

    def _wanted(self, config: Config) -> Iterator[tuple[str, str]]:
        versions = {s.listen.address.version for s in config.services if s.forward.translates}
        if self.forwards_tunnels:
            tunnels = (service for service in config.services if service.forward.encapsulates)
            versions |= {backend.address.version for service in tunnels for backend in service.backends}
        if 4 in versions:
            for interface in self._ports.present:
                yield from self._wanted_ipv4(f"net/ipv4/conf/{interface.name}")
        if 6 in versions:
            yield from self._wanted_ipv6()

    def _wanted_ipv4(self, base: str) -> Iterator[tuple[str, str]]:
        yield f"{base}/forwarding", "1"
        yield f"{base}/accept_local", "1"
        if "1" in (self._sysctls.get("net/ipv4/conf/all/rp_filter"), self._sysctls.get(f"{base}/rp_filter")):
            yield f"{base}/rp_filter", _LOOSE_REVERSE_PATH

    def _wanted_ipv6(self) -> Iterator[tuple[str, str]]:
        if self._sysctls.get(_EVERYWHERE) != "1" or _EVERYWHERE in self._ledger.sysctls:
            # or a forwarding host would lose its own default route
            for name in self._sysctls.children("net/ipv6/conf"):
                path = f"net/ipv6/conf/{name}/accept_ra"
                if name not in ("all", "default") and self._sysctls.get(path) == "1":
                    yield path, "2"
        yield _EVERYWHERE, "1"
        for interface in self._ports.present:
            yield f"net/ipv6/conf/{interface.name}/forwarding", "1"

    def _set(self, path: str, value: str) -> None:
        before = self._sysctls.get(path)
        if before == value:
            return
        if path == _EVERYWHERE:
            self._note_what_forwarding_everywhere_changes()
        self._ledger.sysctls.setdefault(path, before)
        self._ledger.save()
        self._sysctls.set(path, value)

    def _note_what_forwarding_everywhere_changes(self) -> None:
        """To be put back after `all` was, which sets each of them to its own value."""
        for name in self._sysctls.children("net/ipv6/conf"):
            path = f"net/ipv6/conf/{name}/forwarding"
            if name != "all" and self._sysctls.get(path) == "1":
                self._ledger.sysctls.setdefault(path, "1")

    def aggregating(self) -> list[Difference]:
        """Where GRO or LRO are on although XDP runs in generic mode."""
        found = []
        for interface in self._ports.present:
            attached = self._ports.programs[interface.index]
            if attached is None or attached.mode is not AttachMode.GENERIC:
                continue
            on = offloads.receive_aggregation(interface.name)
            if on:
                found.append(
                    Difference(
                        "aggregation-on",
                        interface.name,
                        f"{interface.name} merges packets ({', '.join(sorted(on))}), which XDP sees in generic mode",
                        f"ethtool -K {interface.name} " + " ".join(f"{name} off" for name in sorted(on)),
                        partial(self._stop_aggregation, interface),
                        f"{interface.name} merged packets again: turned {', '.join(sorted(on))} off",
                    )
                )
        return found

    async def _stop_aggregation(self, interface: Interface) -> None:
        self.stop_aggregation(interface)

    def stop_aggregation(self, interface: Interface) -> None:
        """GRO and LRO off, for generic mode."""
        on = offloads.receive_aggregation(interface.name)
        if on:
            noted = self._ledger.aggregation.get(interface.name, ())
            self._ledger.aggregation[interface.name] = sorted({*on, *noted})
            self._ledger.save()
            offloads.disable_receive_aggregation(interface.name)
            log.info("%s: turned %s off: in generic mode XDP would see merged packets", interface.name, ", ".join(on))


def restore(ledger: Ledger, sysctls: Sysctls) -> None:
    """Puts back what we changed, last first. What cannot be put back is told, and does not hold up the rest."""
    for path, before in reversed(ledger.sysctls.items()):
        try:
            sysctls.put_back(path, before)
        except OSError as error:
            log.warning("%s is not what it was before, %s: %s", path.replace("/", "."), before, error.strerror)
    for name, changed in ledger.aggregation.items():
        with suppress(XdplbError, OSError):
            offloads.restore_receive_aggregation(name, changed)
