"""`xdplb decap IFACE`, for backends: takes ipip and gue off before the kernel sees the packet, on any kernel.

Runs in the foreground. When it ends the program goes with it; killed, it leaves the program for the next run to take
over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Collection, Sequence
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from xdplb.core.address_table import address_words
from xdplb.daemon import notify
from xdplb.daemon.ledger import this_namespace
from xdplb.daemon.lock import locked
from xdplb.daemon.logs import log_to_stderr
from xdplb.dataplane import bundle, loader, syscall
from xdplb.dataplane.loader import Loaded
from xdplb.errors import ForeignProgram, UsageError
from xdplb.model import Address, AttachMode
from xdplb.net import bulk
from xdplb.net.links import Links
from xdplb.net.next_hops import Interface
from xdplb.paths import pin_directory, pin_name, runtime_directory

log = logging.getLogger(__name__)

PROGRAM = "xdplb_decap"
MAX_ADDRESSES = 8192
LOOK_AGAIN_S = 1.0
"""A network that becomes local without an address of its own is seen after so long at the latest."""
PAUSE_S = 0.1
"""Events come in bursts: one look is for all of them."""


def run(interface: str, port: int, mode: str, gateways: Sequence[str] = ()) -> None:
    """Until Ctrl-C or SIGTERM. `gateways`: prefixes that tunnel packets may come from; none given: from anywhere.

    Only packets to an address of this host are touched, and only what is for this host is taken out of them.
    """
    log_to_stderr()
    prefixes = [_prefix(text) for text in gateways]
    link = bulk.link_named(interface)
    lock = runtime_directory() / f"decap-{this_namespace()}-{link.index if link else 0}.lock"
    with locked(lock, f"another xdplb decap runs on {interface}", "end that one first"):
        asyncio.run(_run(interface, port, AttachMode(mode), prefixes))
        lock.unlink(missing_ok=True)


def _prefix(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise UsageError(f"--from {text}: {error}", "an address or a prefix: --from 10.0.0.0/24") from None


async def _run(name: str, port: int, mode: AttachMode, prefixes: Sequence[IPv4Network | IPv6Network]) -> None:
    stop = asyncio.Event()
    for ending in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(ending, stop.set)
    async with Links() as links:
        interface = await links.interface(name)
        loaded = await asyncio.to_thread(_load, port, bool(prefixes))
        program = loaded.programs[PROGRAM]
        for prefix in prefixes:
            _put(loaded, "gateways", _trie_key(prefix))
        if not prefixes:
            log.warning("%s: tunnel packets are taken from anybody; name the gateways: --from PREFIX", name)
        own = _Own(links, loaded)
        await own.look()
        tasks = [asyncio.create_task(own.follow()), asyncio.create_task(stop.wait())]
        try:
            await _attach(links, interface, program, mode)
            notify.ready()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await links.detach(interface.index, expected_fd=program)
            _pin(interface.name).unlink(missing_ok=True)
            with suppress(OSError):
                pin_directory().rmdir()  # unless somebody else's pins are there
            log.info("%s: detached; %s", name, _counters(loaded))


def _load(port: int, only_gateways: bool) -> Loaded:
    flags = [f"-DGUE_PORT={port}", f"-DONLY_GATEWAYS={int(only_gateways)}", f"-DMAX_ADDRESSES={MAX_ADDRESSES}"]
    flags += ["-O2", "-Wall", "-Wno-unused-function"]
    loader.ensure_bpffs(pin_directory())
    return loader.load_programs(bundle.bundle("decap.c"), flags, [PROGRAM])


def _pin(interface: str) -> Path:
    return pin_directory() / f"decap-{pin_name(interface)}"


async def _attach(links: Links, interface: Interface, program: int, mode: AttachMode) -> None:
    """In place of the program that a killed run left, or where none is. The pin says which one is ours."""
    current = await links.attached(interface.index)
    left, previous = _left_behind(current.prog_id) if current is not None else (None, None)
    try:
        if current is not None and previous is None:
            raise ForeignProgram(
                f"{interface.name} runs an XDP program already (id {current.prog_id}), and it is not this decapsulator",
                f"see whose it is: bpftool prog show id {current.prog_id}; remove it: ip link set dev {interface.name} "
                "xdp off",
            )
        attachment = await links.attach(interface.index, program, mode, expected_fd=previous)
    finally:
        if previous is not None:
            os.close(previous)
    pin = _pin(interface.name)
    for stale in (left, pin):
        if stale is not None:
            stale.unlink(missing_ok=True)
    syscall.pin(program, pin)
    why = f": no native XDP here ({attachment.fallback})" if attachment.fallback else ""
    log.info("%s: decapsulating in %s mode%s", interface.name, attachment.mode, why)


def _left_behind(program: int) -> tuple[Path | None, int | None]:
    """The pin of a decapsulator of this id, under whatever name its interface had, and its descriptor."""
    for pin in pin_directory().glob("decap-*"):
        with suppress(OSError):
            descriptor = syscall.get(pin)
            if syscall.program_id(descriptor) == program:
                return pin, descriptor
            os.close(descriptor)
    return None, None


class _Own:
    """Keeps the maps of this host's addresses and networks right: they come and go with DHCP, SLAAC and operators."""

    def __init__(self, links: Links, loaded: Loaded) -> None:
        self._links = links
        self._loaded = loaded
        self._known: dict[str, set[bytes]] = {"local_addresses": set(), "local_networks": set()}

    async def follow(self) -> None:
        with self._links.host_changes() as changes:
            change = asyncio.ensure_future(anext(changes))
            try:
                while True:
                    if (await asyncio.wait([change], timeout=LOOK_AGAIN_S))[0]:
                        change = asyncio.ensure_future(anext(changes))
                    await self.look()
                    await asyncio.sleep(PAUSE_S)
            finally:
                change.cancel()

    async def look(self) -> None:
        addresses = await self._links.addresses()
        networks = await self._links.local_networks() | {ip_network(one) for one in addresses if not one.is_loopback}
        self._keep("local_addresses", {_words(address) for address in addresses})
        self._keep("local_networks", {_trie_key(network) for network in networks})

    def _keep(self, name: str, keys: Collection[bytes]) -> None:
        known, present = self._known[name], set(sorted(keys)[:MAX_ADDRESSES])
        if len(keys) > MAX_ADDRESSES and present != known:
            log.warning("%d %s, of which %d are known here", len(keys), name.replace("_", " "), MAX_ADDRESSES)
        for key in known - present:
            syscall.delete(self._loaded.fd(name), key)
        for key in present - known:
            _put(self._loaded, name, key)
        self._known[name] = present


def _words(address: Address) -> bytes:
    return b"".join(word.to_bytes(8, "little") for word in address_words(address))


def _trie_key(prefix: IPv4Network | IPv6Network) -> bytes:
    """`struct network`."""
    length = prefix.prefixlen + (96 if prefix.version == 4 else 0)
    return length.to_bytes(4, "little") + _words(prefix.network_address)


def _put(loaded: Loaded, name: str, key: bytes) -> None:
    syscall.update(loaded.fd(name), key, (1).to_bytes(4, "little"))


def _counters(loaded: Loaded) -> str:
    fields = loaded.fields("decap_counters")
    values = syscall.read_per_cpu_value(loaded.fd("decap_counters"), 0)
    return ", ".join(f"{name} {value}" for name, value in zip(fields, values, strict=True))
