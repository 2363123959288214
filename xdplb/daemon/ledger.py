"""What one instance changed on its host, so that all of it can be undone, by a process that knows nothing else.

A small JSON file beside the control socket, written before each change. It is apart from the manifest, which is large
and tells of the packet path.

What two instances need is undone by the one that ends last: the other bequeaths it, as a ledger too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from xdplb.dataplane import manifest
from xdplb.errors import XdplbError
from xdplb.net.next_hops import Interface
from xdplb.paths import Instance, instances, replace_file

_INHERITED = "inherited.json"


@dataclass(slots=True)
class Ledger:
    """`interfaces` has (index, MAC) by name, the one that faces the clients first: a name is a label, which may have
    changed since. `addresses` are (interface, address) that we added, `sysctls` and `aggregation` what was before, by
    names of `interfaces`, `programs` the ids of what we attached. `relies` are the addresses that our services need,
    whoever added them. `namespace` is the inode of the network namespace. `probe_link` is the interface that we made
    for checks through services.
    """

    path: Path
    interfaces: dict[str, tuple[int, str]] = field(default_factory=dict)
    addresses: list[tuple[str, str]] = field(default_factory=list)
    sysctls: dict[str, str] = field(default_factory=dict)
    aggregation: dict[str, list[str]] = field(default_factory=dict)
    programs: list[int] = field(default_factory=list)
    relies: list[str] = field(default_factory=list)
    namespace: int = 0
    probe_link: str = ""
    _saved: str = field(default="", compare=False)

    def save(self) -> None:
        """Raises XdplbError; then nothing may be changed. What is noted already needs no room on the disk."""
        notes = asdict(self)
        text = json.dumps({name: notes[name] for name in notes if name not in ("path", "_saved")})
        if text != self._saved or not self.path.exists():
            replace_file(self.path, text)
            self._saved = text

    def know(self, interfaces: Sequence[Interface]) -> None:
        """Takes note of the interfaces as they are; those that were noted under another name get their new one."""
        for interface in interfaces:
            for name, (index, _) in list(self.interfaces.items()):
                if index == interface.index and name != interface.name:
                    self._rename(name, interface.name)
        now = {interface.name: (interface.index, interface.mac.hex(":")) for interface in interfaces}
        indexes = {index for index, _ in now.values()}
        earlier = {name: known for name, known in self.interfaces.items() if known[0] not in indexes}
        self.interfaces = now | {name: known for name, known in earlier.items() if name not in now}

    def _rename(self, old: str, new: str) -> None:
        self.addresses = [(new if name == old else name, address) for name, address in self.addresses]
        self.sysctls = {of_interface(path, old, new): before for path, before in self.sysctls.items()}
        if old in self.aggregation:
            self.aggregation[new] = self.aggregation.pop(old)

    def forget(self, name: str) -> None:
        """The interface is gone, and with it all that we changed there."""
        self.addresses = [note for note in self.addresses if note[0] != name]
        self.sysctls = {path: value for path, value in self.sysctls.items() if not belongs_to(path, name)}
        self.aggregation.pop(name, None)
        self.interfaces.pop(name, None)

    def brought_up_to(self, present: Iterable[Interface]) -> None:
        """Finds the noted interfaces among those of this host, whatever they are called by now.

        By index and MAC: another interface may have got the index. By name where none has both.
        """
        by_index = {interface.index: interface for interface in present}
        for name, (index, mac) in list(self.interfaces.items()):
            now = by_index.get(index)
            if now is not None and now.name != name and now.mac.hex(":") == mac:
                self._rename(name, now.name)
                self.interfaces[now.name] = self.interfaces.pop(name)

    def absorb(self, instance: Instance) -> None:
        """Takes over what other instances bequeathed to this one."""
        path = instance.runtime / _INHERITED
        if not path.exists():
            return
        legacy = _read(path)
        self.addresses += [note for note in legacy.addresses if note not in self.addresses]
        self.sysctls.update(legacy.sysctls)
        self.save()
        path.unlink(missing_ok=True)

    def bequeath(self, instance: Instance) -> list[str]:
        """Leaves to other instances what they need as well, and strikes it off here. A line for each."""
        told = []
        for other, theirs in others(instance, self.namespace):
            legacy = Ledger(other.runtime / _INHERITED)
            if legacy.path.exists():
                legacy = _read(legacy.path)
            shared = [note for note in self.addresses if note[1] in theirs.relies]
            legacy.addresses += [note for note in shared if note not in legacy.addresses]
            self.addresses = [note for note in self.addresses if note not in shared]
            told += [f"left {address} to {other.name}, which needs it too" for _, address in shared]
            everywhere = {
                path: before
                for path, before in self.sysctls.items()
                if not any(belongs_to(path, name) for name in self.interfaces)
            }
            legacy.sysctls.update(everywhere)
            self.sysctls = {path: before for path, before in self.sysctls.items() if path not in everywhere}
            if legacy.addresses or legacy.sysctls:
                legacy.save()
        return told


def others(instance: Instance, namespace: int) -> list[tuple[Instance, Ledger]]:
    """The other instances of this network namespace, running or left behind."""
    found = []
    for other in instances():
        if other != instance:
            with suppress(XdplbError):
                found.append((other, load(other)))
    return [(other, ledger) for other, ledger in found if ledger.namespace == namespace]


def this_namespace() -> int:
    return Path("/proc/thread-self/ns/net").stat().st_ino


def belongs_to(path: str, interface: str) -> bool:
    """Whether a setting, net/ipv4/conf/eth0/forwarding, is one of this interface."""
    return path.split("/")[2:4] == ["conf", interface]


def of_interface(path: str, old: str, new: str) -> str:
    """The same setting of another interface, where it is one of `old`."""
    if not belongs_to(path, old):
        return path
    parts = path.split("/")
    return "/".join([*parts[:3], new, *parts[4:]])


def load(instance: Instance) -> Ledger:
    """An empty one where there is none. XdplbError where it cannot be understood."""
    if instance.ledger.exists():
        return _read(instance.ledger)
    ledger = Ledger(instance.ledger)
    earlier = manifest.load(instance.manifest)  # versions before the ledger noted it there
    if earlier is not None:
        ledger.addresses = [(name, address) for name, address in earlier.addresses]
        ledger.sysctls, ledger.aggregation = earlier.sysctls, earlier.aggregation
        ledger.programs = earlier.programs
    return ledger


def _read(path: Path) -> Ledger:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["interfaces"] = {name: (index, mac) for name, (index, mac) in data["interfaces"].items()}
        data["addresses"] = [(name, address) for name, address in data["addresses"]]
        return Ledger(path, **data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        hint = "remove it; then undo by hand what xdplb changed on this host: ip address, ip link, sysctl"
        raise XdplbError(f"{path} cannot be read: {error}", hint) from error
