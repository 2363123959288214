"""Why the kernel would not attach an XDP program, in words that help. Pure."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from xdplb.errors import ForeignProgram, NotCapable, NotPrivileged, XdplbError
from xdplb.model import AttachMode
from xdplb.net.next_hops import Interface


@dataclass(frozen=True, slots=True)
class Refusal:
    """The kernel's answer: an errno, and the extended acknowledgement's text (the errno's own where there is none)."""

    code: int
    text: str


def attach_error(interface: Interface, mode: AttachMode, refusal: Refusal, attached_prog_id: int | None) -> XdplbError:
    name = interface.name
    if refusal.code in (errno.EPERM, errno.EACCES):
        return NotPrivileged(
            f"no permission to attach an XDP program to {name}", "run as root, or with CAP_NET_ADMIN and CAP_BPF"
        )
    if refusal.code in (errno.EBUSY, errno.EEXIST):
        if "BPF XDP link" in refusal.text:
            return ForeignProgram(
                f"{name} runs an XDP program that another process holds by a BPF link: {refusal.text}",
                "see who: bpftool link; it goes when that process ends",
            )
        which = "an XDP program" if attached_prog_id is None else f"the XDP program with id {attached_prog_id}"
        return ForeignProgram(
            f"{name} runs {which}, which is not ours: {refusal.text}",
            f"look at it: bpftool net show dev {name}; take it off: ip link set dev {name} xdp off; "
            "or let xdplb take its place: --replace",
        )
    if mode is AttachMode.NATIVE:
        return _native_error(interface, refusal)
    return NotCapable(
        f"{name}: cannot attach in generic mode: {refusal.text}", f"look: dmesg | tail; ethtool -i {name}"
    )


def _native_error(interface: Interface, refusal: Refusal) -> NotCapable:
    name = interface.name
    generic = "use --mode generic (slower)"
    about_mtu = refusal.code == errno.ERANGE or re.search(r"\bmtu\b", refusal.text, re.IGNORECASE)
    if about_mtu:
        limit = re.search(r"\d{3,}", refusal.text)
        target = f"to {limit[0]}" if limit else "to 3498 (what fits into a page)"
        whose = "of its peer" if "peer" in refusal.text.lower() else f"of {name}"
        return NotCapable(
            f"the MTU is above what native XDP takes on {name} (its own MTU is {interface.mtu}): {refusal.text}",
            f"lower the MTU {whose} {target}, or {generic}",
        )
    if refusal.code == errno.EOPNOTSUPP:
        return NotCapable(f"{name}: the driver has no native XDP: {refusal.text}", generic)
    return NotCapable(f"{name}: cannot attach in native mode: {refusal.text}", f"{generic}; look: ethtool -i {name}")
