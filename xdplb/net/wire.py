"""What an interface does with frames, as far as that shows from here.

Does it send those that XDP redirects to it? Do packets arrive with their checksums finished?

Functions block; they are for threads. Numbers: include/uapi/linux/{genetlink,netdev,if_packet}.h.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from functools import lru_cache

from xdplb.net.bulk import NLM_F_DUMP, NLM_F_REQUEST, NLMSG_ERROR, answers, attribute, attributes, messages
from xdplb.net.next_hops import Interface

NETLINK_GENERIC, GENL_ID_CTRL = 16, 0x10
CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 3, 1, 2
NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, NETDEV_A_DEV_XDP_FEATURES = 1, 1, 3
NETDEV_XDP_ACT_NDO_XMIT = 1 << 2

SOL_PACKET, PACKET_AUXDATA = 263, 8
ETH_P_ALL, PACKET_OUTGOING = 3, 4
TP_STATUS_CSUMNOTREADY = 1 << 3
LISTEN_S, ENOUGH_PACKETS = 0.5, 64

_NETLINK = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")


def refusing() -> frozenset[int] | None:
    """The interfaces, by index, whose drivers do not send frames that XDP redirects to them. A veth does where its peer
    has GRO switched on, or a program; most cards do while a program runs on them. None where this kernel does not tell
    (before 6.3).
    """
    family = _family()
    if family is None:
        return None
    body = _GENERIC.pack(NETDEV_CMD_DEV_GET, 1, 0)
    found = set()
    with _requests() as requests:
        header = _NETLINK.pack(_NETLINK.size + len(body), family, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
        requests.send(header + body)
        for answer in answers(requests)[0]:
            fields = dict(attributes(answer, _GENERIC.size))
            features = fields.get(NETDEV_A_DEV_XDP_FEATURES)
            if features is not None and not struct.unpack("=Q", features)[0] & NETDEV_XDP_ACT_NDO_XMIT:
                found.add(struct.unpack("=I", fields[NETDEV_A_DEV_IFINDEX])[0])
    return frozenset(found)


def _requests() -> socket.socket:
    requests = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC)
    requests.settimeout(2)
    return requests


@lru_cache(1)
def _family() -> int | None:
    answer = _ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, attribute(CTRL_ATTR_FAMILY_NAME, b"netdev\0"))
    return struct.unpack("=H", answer[CTRL_ATTR_FAMILY_ID])[0] if answer else None


def _ask(family: int, command: int, body: bytes) -> dict[int, memoryview] | None:
    body = _GENERIC.pack(command, 1, 0) + body
    with _requests() as requests:
        requests.send(_NETLINK.pack(_NETLINK.size + len(body), family, NLM_F_REQUEST, 1, 0) + body)
        answer = next(messages(memoryview(requests.recv(1 << 16))))
    return None if answer.kind == NLMSG_ERROR else dict(attributes(answer.body, _GENERIC.size))


def checksums(interface: Interface) -> dict[bytes, bool]:
    """Of the hosts that sent packets during half a second, by MAC: whether all their checksums were finished.

    Veth delivers packets as the sender's stack left them to a card that is not there. XDP cannot finish them.
    """
    found: dict[bytes, bool] = {}
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    deadline = time.monotonic() + LISTEN_S
    with socket.socket(socket.AF_PACKET, kind, 0) as wire:
        wire.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        wire.bind((interface.name, ETH_P_ALL))
        for _ in range(ENOUGH_PACKETS):
            if not select.select([wire], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            frame, ancillary, _, sender = wire.recvmsg(14, socket.CMSG_SPACE(20))
            if sender[2] == PACKET_OUTGOING:
                continue
            for level, kind_of_data, data in ancillary:
                if (level, kind_of_data) == (SOL_PACKET, PACKET_AUXDATA):
                    finished = not struct.unpack_from("=I", data)[0] & TP_STATUS_CSUMNOTREADY
                    found[frame[6:12]] = found.get(frame[6:12], True) and finished
    return found
