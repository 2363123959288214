"""Receive aggregation (GRO, LRO) through the ethtool ioctl.

In generic mode an XDP program sees what the stack has aggregated: packets of up to 64 KB, which no next hop would take.
Numbers are those of include/uapi/linux/ethtool.h and sockios.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct
from collections.abc import Iterable

from xdplb.errors import NotCapable, NotPrivileged

SIOCETHTOOL = 0x8946
ETHTOOL_GFLAGS, ETHTOOL_SFLAGS = 0x25, 0x26
ETHTOOL_GGRO, ETHTOOL_SGRO = 0x2B, 0x2C
ETHTOOL_STXCSUM = 0x17
ETH_FLAG_LRO = 1 << 15


def receive_aggregation(ifname: str) -> frozenset[str]:
    """Those of "gro", "lro" that are on."""
    lro = (_ethtool(ifname, ETHTOOL_GFLAGS) or 0) & ETH_FLAG_LRO
    return frozenset(name for name, on in (("gro", _ethtool(ifname, ETHTOOL_GGRO)), ("lro", lro)) if on)


def disable_receive_aggregation(ifname: str) -> frozenset[str]:
    """Turns GRO and LRO off. Returns those that were on, for `restore_receive_aggregation`."""
    changed = receive_aggregation(ifname)
    if "gro" in changed:
        _ethtool(ifname, ETHTOOL_SGRO, 0)
    if "lro" in changed:
        _ethtool(ifname, ETHTOOL_SFLAGS, (_ethtool(ifname, ETHTOOL_GFLAGS) or 0) & ~ETH_FLAG_LRO)
    return changed


def suit_redirection(ifname: str) -> None:
    """Has a veth take frames that XDP redirects to its peer (GRO), and send finished checksums, which XDP needs."""
    _ethtool(ifname, ETHTOOL_SGRO, 1)
    _ethtool(ifname, ETHTOOL_STXCSUM, 0)


def restore_receive_aggregation(ifname: str, changed: Iterable[str]) -> None:
    """Turns on again what `disable_receive_aggregation` returned. An interface that is gone is passed over."""
    if "gro" in changed:
        _ethtool(ifname, ETHTOOL_SGRO, 1, gone_ok=True)
    if "lro" in changed:
        flags = _ethtool(ifname, ETHTOOL_GFLAGS, gone_ok=True)
        if flags is not None:
            _ethtool(ifname, ETHTOOL_SFLAGS, flags | ETH_FLAG_LRO, gone_ok=True)


def _ethtool(ifname: str, command: int, data: int = 0, *, gone_ok: bool = False) -> int | None:
    """One `struct ethtool_value` request. Returns its data afterwards, None where the driver knows no such command."""
    value = ctypes.create_string_buffer(struct.pack("=II", command, data), 8)
    request = struct.pack("@16sP16x", ifname.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        try:
            fcntl.ioctl(control, SIOCETHTOOL, request)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP or (gone_ok and error.errno == errno.ENODEV):
                return None
            if error.errno == errno.EPERM:
                raise NotPrivileged(f"no permission to change the offloads of {ifname}", "run as root") from error
            raise NotCapable(
                f"cannot change the offloads of {ifname}: {error.strerror}", f"look: ethtool -k {ifname}"
            ) from error
    return int(struct.unpack("=II", value.raw)[1])
