"""Interfaces, XDP programs, addresses and settings, against the real kernel."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from cable import GATEWAY4, GATEWAY6, TIMEOUT_S, Lab, cabled, ip, libc

from xdplb.errors import ForeignProgram, NotCapable
from xdplb.model import Address, AttachMode
from xdplb.net.links import Attached, Links
from xdplb.net.next_hops import Route
from xdplb.net.offloads import disable_receive_aggregation, restore_receive_aggregation
from xdplb.net.sysctl import Sysctls

BPF_PROG_LOAD, BPF_OBJ_GET_INFO_BY_FD, BPF_PROG_TYPE_XDP, SYS_BPF = 5, 15, 6, {"x86_64": 321, "aarch64": 280}
BPF_LINK_CREATE, BPF_XDP = 28, 37
VIP4, VIP6 = ip_address("192.0.2.10"), ip_address("2001:db8::10")

pytestmark = pytest.mark.usefixtures("able")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with cabled() as made:
        yield made


def bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    result = libc.syscall(SYS_BPF[os.uname().machine], command, buffer, 128)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"bpf({command})")
    return int(result)


@contextlib.contextmanager
def pass_program() -> Iterator[int]:
    """The XDP program `return XDP_PASS`, as a file descriptor: mov r0, 2; exit."""
    instructions = (ctypes.c_uint64 * 2)(0xB7 | 2 << 32, 0x95)
    licence = ctypes.create_string_buffer(b"GPL")
    described = struct.pack("=IIQQ", BPF_PROG_TYPE_XDP, 2, ctypes.addressof(instructions), ctypes.addressof(licence))
    fd = bpf(BPF_PROG_LOAD, described)
    try:
        yield fd
    finally:
        os.close(fd)


def program_id(fd: int) -> int:
    info = ctypes.create_string_buffer(64)
    bpf(BPF_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, 64, ctypes.addressof(info)))
    return int(struct.unpack_from("=II", info.raw)[1])


@pytest.mark.parametrize("mode", [AttachMode.NATIVE, AttachMode.GENERIC])
def test_attach_swap_detach(lab: Lab, mode: AttachMode) -> None:
    async def test() -> None:
        async with Links() as links:
            index = (await links.interface("gw0")).index
            with pass_program() as first, pass_program() as second:
                assert await links.attached(index) is None
                assert (await links.attach(index, first, mode)).mode is mode
                assert await links.attached(index) == Attached(program_id(first), mode)
                assert (await links.attach(index, second, AttachMode.AUTO, expected_fd=first)).mode is mode
                assert await links.attached(index) == Attached(program_id(second), mode)
                assert not await links.detach(index, expected_fd=first)
                assert await links.detach(index, expected_fd=second)
                assert await links.attached(index) is None
                assert not await links.detach(index)

    lab.run(test)


def test_auto_prefers_native(lab: Lab) -> None:
    async def test() -> None:
        async with Links() as links:
            with pass_program() as program:
                attachment = await links.attach((await links.interface("gw0")).index, program)
            assert (attachment.mode, attachment.fallback) == (AttachMode.NATIVE, "")

    lab.run(test)


def test_auto_falls_back_and_says_why(lab: Lab) -> None:
    async def test() -> None:
        async with Links() as links:
            loopback = (await links.interface("lo")).index
            with pass_program() as program:
                attachment = await links.attach(loopback, program)
                assert attachment.mode is AttachMode.GENERIC
                assert attachment.fallback.startswith("lo: the driver has no native XDP")
                await links.detach(loopback, program)
                with pytest.raises(NotCapable) as caught:
                    await links.attach(loopback, program, AttachMode.NATIVE)
                assert "--mode generic" in caught.value.hint

    lab.run(test)


@pytest.mark.parametrize("foreign", [AttachMode.NATIVE, AttachMode.GENERIC])
@pytest.mark.parametrize("ours", list(AttachMode))
def test_a_foreign_program_stays(lab: Lab, foreign: AttachMode, ours: AttachMode) -> None:
    async def test() -> None:
        async with Links() as links:
            index = (await links.interface("gw0")).index
            with pass_program() as theirs, pass_program() as program:
                await links.attach(index, theirs, foreign)
                with pytest.raises(ForeignProgram) as caught:
                    await links.attach(index, program, ours)
                assert await links.attached(index) == Attached(program_id(theirs), foreign)
                assert "gw0" in caught.value.message and f"id {program_id(theirs)}," in caught.value.message
                assert "--replace" in caught.value.hint
                with pytest.raises(ForeignProgram):
                    await links.attach(index, program, AttachMode.AUTO, expected_fd=program)
                replaced = await links.replace(index, program, ours)
                assert replaced.mode is (AttachMode.NATIVE if ours is AttachMode.AUTO else ours)
                assert await links.attached(index) == Attached(program_id(program), replaced.mode)

    lab.run(test)


def test_a_program_held_by_a_bpf_link_stays(lab: Lab) -> None:
    async def test() -> None:
        async with Links() as links:
            index = (await links.interface("gw0")).index
            with pass_program() as theirs, pass_program() as program:
                link = bpf(BPF_LINK_CREATE, struct.pack("=IIII", theirs, index, BPF_XDP, 0))
                try:
                    for refused in (links.attach(index, program), links.replace(index, program), links.detach(index)):
                        with pytest.raises(ForeignProgram, match="gw0"):
                            await refused
                    assert (await links.attached(index)) == Attached(program_id(theirs), AttachMode.NATIVE)
                finally:
                    os.close(link)

    lab.run(test)


def test_the_mode_of_a_running_program_cannot_change(lab: Lab) -> None:
    async def test() -> None:
        async with Links() as links:
            index = (await links.interface("gw0")).index
            with pass_program() as first, pass_program() as second:
                await links.attach(index, first, AttachMode.NATIVE)
                with pytest.raises(NotCapable, match="native mode, which cannot become generic") as caught:
                    await links.attach(index, second, AttachMode.GENERIC, expected_fd=first)
                assert "xdplb down gw0" in caught.value.hint
                assert await links.attached(index) == Attached(program_id(first), AttachMode.NATIVE)
                await links.detach(index, first)
                with pytest.raises(ForeignProgram, match="is gone"):
                    await links.attach(index, second, expected_fd=first)

    lab.run(test)


def test_an_mtu_above_what_native_takes(lab: Lab) -> None:
    async def test() -> None:
        async with Links() as links:
            index = (await links.interface("gw0")).index
            with pass_program() as program:
                with pytest.raises(NotCapable, match="MTU") as caught:
                    await links.attach(index, program, AttachMode.NATIVE)
                assert "peer" in caught.value.hint.lower() and "--mode generic" in caught.value.hint
                attachment = await links.attach(index, program)
                assert attachment.mode is AttachMode.GENERIC and "MTU" in attachment.fallback

    lab.be("link set be0 mtu 9000")
    lab.run(test)


def test_a_missing_interface_is_named_and_the_others_listed(lab: Lab) -> None:
    async def test() -> None:
        async with Links() as links:
            with pytest.raises(NotCapable) as caught:
                await links.interface("gw1")
            assert caught.value.message == "no interface is named 'gw1'"
            assert caught.value.hint == "did you mean 'gw0'? this host has: gw0, lo"
            with pytest.raises(NotCapable, match="is gone"):
                await links.attached(4711)
            assert not await links.detach(4711)
            assert (await links.interface("gateway-side")).name == "gw0"

    lab.gw("link property add dev gw0 altname gateway-side")
    lab.run(test)


def test_what_an_interface_says(lab: Lab) -> None:
    async def test() -> None:
        async with Links() as links:
            interface = await links.interface("gw0")
            assert (interface.mac.hex(":"), interface.mtu, interface.kind) == ("02:00:00:00:07:01", 1400, "veth")
            assert interface.up and interface.carrier
            assert (await links.interface("lo")).mac == b""

    lab.gw("link set gw0 address 02:00:00:00:07:01 mtu 1400")
    lab.run(test)


async def becomes_local(links: Links, address: Address) -> None:
    """For IPv6 the kernel adds this route from a work queue (addrconf_dad_work), a moment after the address."""
    async with asyncio.timeout(TIMEOUT_S):
        while (route := await links.route(address)) is None or not route.local:
            pass


@pytest.mark.parametrize("vip", [VIP4, VIP6])
def test_a_vip_comes_and_goes(lab: Lab, vip: Address) -> None:
    async def test() -> None:
        async with Links() as links:
            index = (await links.interface("gw0")).index
            await links.add_addresses(index, [vip])
            await becomes_local(links, vip)
            listener = await asyncio.start_server(lambda reader, writer: writer.close(), str(vip), 8080)
            listener.close()
            await links.add_addresses(index, [vip])
            for where in (index, index, 4711):
                await links.remove_addresses(where, [vip])
            route = await links.route(vip)
            assert route is None or not route.local

    lab.run(test)


def test_an_ipv6_vip_is_never_a_source(lab: Lab) -> None:
    """Its prefix is longer than the gateway's own, which the kernel would prefer otherwise."""

    async def test() -> None:
        async with Links() as links:
            await links.add_addresses((await links.interface("gw0")).index, [ip_address("fd07::12")])
            route = await links.route(ip_address("fd07::13"))
            assert route is not None and route.source == GATEWAY6

    lab.run(test)


def test_the_routes_of_many_addresses_are_those_that_ip_shows(lab: Lab) -> None:
    """More than fit into one batch, and some that lead nowhere."""
    several = {
        "10.9.1.1": "10.9.1.1 via 10.7.0.11 dev gw0 src 10.7.0.1",
        "10.9.2.1": "10.9.2.1 via inet6 fd07::11 dev gw0 src 10.7.0.1",
        "10.7.0.1": "local 10.7.0.1 dev lo src 10.7.0.1",
        "fd09::1": "fd09::1 from :: via fd07::11 dev gw0",
        "10.7.0.77": "10.7.0.77 dev gw0 src 10.7.0.1",
    }

    async def test() -> None:
        async with Links() as links:
            gw0, lo = [(await links.interface(name)).index for name in ("gw0", "lo")]
            nowhere = [ip_address(f"10.20.{n // 200}.{n % 200}") for n in range(1000)]
            unwanted = [ip_address(text) for text in ("10.10.1.1", "10.10.2.1", "fd10::1", "255.255.255.255")]
            found = await links.routes([*nowhere, *map(ip_address, several), *unwanted])
            assert len(found) == len(nowhere) + len(several) + len(unwanted)
            assert {found[address] for address in (*nowhere, *unwanted)} == {None}
            for text, shown in several.items():
                assert ip(f"-n {lab.gateway} route get {text}").startswith(shown), "the test knows `ip`"
            via4, via6, own, six, on_link = (found[ip_address(text)] for text in several)
            assert via4 == Route(gw0, ip_address("10.7.0.11"), GATEWAY4, 1300)
            assert via6 == Route(gw0, ip_address("fd07::11"), GATEWAY4, None)
            assert own == Route(lo, None, GATEWAY4, None, local=True)
            assert six is not None and (six.ifindex, six.gateway) == (gw0, ip_address("fd07::11"))
            assert on_link == Route(gw0, None, GATEWAY4, None)

    lab.gw("route add 10.9.1.0/24 via 10.7.0.11 mtu 1300")
    lab.gw("route add 10.9.2.0/24 via inet6 fd07::11 dev gw0")
    lab.gw("-6 route add fd09::/64 via fd07::11")
    lab.gw("route add unreachable 10.10.1.0/24")
    lab.gw("route add blackhole 10.10.2.0/24")
    lab.gw("-6 route add prohibit fd10::/64")
    lab.run(test)


def test_receive_aggregation_goes_off_and_comes_back(lab: Lab) -> None:
    def gro() -> str:
        command = ["ip", "netns", "exec", lab.gateway, "ethtool", "-k", "gw0"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return next(line for line in shown.splitlines() if line.startswith("generic-receive-offload"))

    async def test() -> None:
        before = gro()
        changed = disable_receive_aggregation("gw0")
        assert "off" in gro()
        assert disable_receive_aggregation("gw0") == frozenset()
        restore_receive_aggregation("gw0", changed)
        assert gro() == before
        assert ("gro" in changed) == ("on" in before.split(":")[1])
        restore_receive_aggregation("gw9", changed)
        with pytest.raises(NotCapable, match="gw9") as caught:
            disable_receive_aggregation("gw9")
        assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENODEV

    subprocess.run(["ip", "netns", "exec", lab.gateway, "ethtool", "-K", "gw0", "gro", "on"], check=True)
    lab.run(test)


def test_sysctls_come_back(lab: Lab) -> None:
    async def test() -> None:
        lab.gw("link set gw0 name gw0.5")
        path, other = "net/ipv4/conf/gw0.5/forwarding", "net/ipv4/conf/lo/rp_filter"
        sysctls = Sysctls()
        before = sysctls.get(path)
        assert sysctls.set(path, "1") and not sysctls.set(path, "1")
        assert sysctls.set(path, "0") and sysctls.set(path, "1")
        assert sysctls.set(other, "2" if sysctls.get(other) != "2" else "1")
        assert sysctls.get(path) == "1"
        sysctls.put_back(path, "0")
        sysctls.put_back("net/ipv4/conf/gone/forwarding", "0")
        assert sysctls.get(path) == before == "0"
        with pytest.raises(NotCapable, match="no setting net/ipv4/nonsense"):
            sysctls.set("net/ipv4/nonsense", "1")
        with pytest.raises(NotCapable, match="cannot set"):
            sysctls.set(path, "many")

    lab.run(test)
