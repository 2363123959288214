"""Kernel settings that a configuration needs: set with what was there before noted, and put back."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from xdplb.dataplane.manifest import Manifest
from xdplb.errors import XdplbError
from xdplb.model import Config
from xdplb.net.next_hops import Interface
from xdplb.net.offloads import disable_receive_aggregation, restore_receive_aggregation
from xdplb.net.sysctl import Sysctls
from xdplb.paths import Instance, instances

log = logging.getLogger(__name__)

_LOOSE_REVERSE_PATH = "2"
_INHERITED = "inherited_sysctls.json"
"""What settings of the whole host were before another instance, gone by now, changed them."""


class KernelSettings:
    """Every change is noted in the manifest before it is made."""

    def __init__(self, instance: Instance, interfaces: Sequence[Interface], notes: Manifest) -> None:
        self._instance = instance
        self._interfaces = interfaces
        self._notes = notes
        self._sysctls = Sysctls()

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

    def stop_aggregation(self, interface: Interface) -> None:
        """GRO and LRO off, for generic mode."""
        changed = disable_receive_aggregation(interface.name)
        if changed:
            self._notes.aggregation[interface.name] = sorted(
                {*changed, *self._notes.aggregation.get(interface.name, ())}
            )
            self._save()
            log.info(
                "%s: turned %s off: in generic mode XDP would see merged packets", interface.name, ", ".join(changed)
            )

    def _save(self) -> None:
        self._notes.save(self._instance.manifest)


def restore(instance: Instance, notes: Manifest) -> None:
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
    for name, changed in notes.aggregation.items():
        with suppress(XdplbError, OSError):
            restore_receive_aggregation(name, changed)


def _inherited(instance: Instance) -> dict[str, str]:
    try:
        return dict(json.loads((instance.runtime / _INHERITED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
