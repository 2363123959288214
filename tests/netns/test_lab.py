"""The laboratory keeps its promises: networks that work by plain routing, real servers, and nothing left behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import xdplb
from xdplb.errors import XdplbError
from xdplb.lab.hosts import uninterrupted
from xdplb.lab.laboratory import (
    BIG_BYTES,
    VIP4,
    VIP6,
    CommandFailed,
    Host,
    HttpLoad,
    Laboratory,
    Shape,
    UdpEcho,
    WebServer,
    await_until,
    remove_stale,
)
from xdplb.model import Address, Forward

MakeLaboratory = Callable[..., Laboratory]
ETH_P_ALL = 3

pytestmark = pytest.mark.usefixtures("able")


def left_by(prefix: str) -> list[str]:
    """What of a laboratory (or of all laboratories of a process: `xdplb-lab-PID-`) is still there."""
    places = (Path("/run/netns"), Path("/run"), Path("/sys/fs/bpf"))
    return [str(path) for place in places for path in place.glob(f"{prefix}*")]


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def url(address: Address, path: str = "/", scheme: str = "http") -> str:
    return f"{scheme}://[{address}]{path}" if address.version == 6 else f"{scheme}://{address}{path}"


class TestShapes:
    @pytest.mark.parametrize("routed_client", [False, True], ids=["on-link", "routed"])
    @pytest.mark.parametrize("shape", Shape)
    def test_client_reaches_gateway_and_backends_in_both_families(self, shape: Shape, routed_client: bool) -> None:
        with Laboratory(shape, backends=2, routed_client=routed_client) as lab:
            for host in (lab.gateway, *lab.backends):
                lab.client.ping(host.address4)
                lab.client.ping(host.address6)

    def test_two_armed_traffic_passes_the_gateway(self, two_armed: MakeLaboratory) -> None:
        lab = two_armed(backends=1)
        assert lab.gateway.interfaces == ("eth0", "eth1")
        lab.gateway.shell("echo 0 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv6/conf/all/forwarding")
        for address in (lab.backends[0].address4, lab.backends[0].address6):
            lab.gateway.ping(address)
            with pytest.raises(XdplbError, match="does not answer ping"):
                lab.client.ping(address, timeout_s=0.2)

    def test_backend_mtu_holds_from_the_gateway_to_the_backends_only(self, two_armed: MakeLaboratory) -> None:
        lab = two_armed(backends=1, backend_mtu=1600)
        mtu = "cat /proc/sys/net/ipv6/conf/{}/mtu"
        assert lab.gateway.shell(mtu.format("eth0")) == "1500\n"
        assert lab.gateway.shell(mtu.format("eth1")) == "1600\n"
        assert lab.backends[0].shell(mtu.format("eth0")) == "1600\n"
        assert lab.client.shell(mtu.format("eth0")) == "1500\n"

    @pytest.mark.parametrize("shape", Shape)
    def test_frames_arrive_in_real_size_with_complete_checksums(self, shape: Shape) -> None:
        """What an XDP program on the gateway needs, in both directions."""
        with Laboratory(shape, backends=1, routed_client=True) as lab, WebServer(lab.backends[0]):
            tap = lab.gateway.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            with tap:
                tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
                tap.settimeout(0.1)
                lab.client.curl(url(lab.backends[0].address4, "/big"))
                frames = list(incoming_tcp4(tap))
        assert sum(map(len, frames)) > BIG_BYTES
        assert max(map(len, frames)) == 1514
        assert {tcp4_checksum(frame) for frame in frames} == {0}


def incoming_tcp4(tap: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            frame, (_interface, protocol, kind, *_) = tap.recvfrom(1 << 17)
        except TimeoutError:
            return
        if kind != socket.PACKET_OUTGOING and protocol == 0x0800 and frame[23] == socket.IPPROTO_TCP:
            yield frame


def tcp4_checksum(frame: bytes) -> int:
    """RFC 9293 3.1: 0 for a segment whose checksum is right."""
    packet = frame[14 : 14 + int.from_bytes(frame[16:18], "big")]
    segment = packet[(packet[0] & 15) * 4 :]
    covered = packet[12:20] + bytes((0, 6)) + len(segment).to_bytes(2, "big") + segment + bytes(len(segment) % 2)
    total = sum(int.from_bytes(covered[at : at + 2], "big") for at in range(0, len(covered), 2))
    return (total % 0xFFFF) ^ 0xFFFF if total % 0xFFFF else 0


class TestForwardModes:
    def test_backends_answer_a_client_beside_them_as_the_mode_demands(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1)
        backend, client = lab.backends[0], lab.client
        for forward in (Forward.NAT, Forward.DSR, Forward.NAT, Forward.GUE):
            lab.prepare(forward)
            nat = forward is Forward.NAT
            for address, gateway in ((client.address4, lab.gateway.address4), (client.address6, lab.gateway.address6)):
                route = backend.run(["ip", "route", "get", str(address)]).stdout
                assert (f"via {gateway}" in route) == nat
                client.ping(backend.address(address.version))
            on_loopback = backend.run(["ip", "addr", "show", "dev", "lo"]).stdout
            assert [f"{vip}/" in on_loopback for vip in (VIP4, VIP6)] == [not nat, not nat]

    def test_backends_answer_a_routed_client_as_the_mode_demands(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1, routed_client=True)
        backend = lab.backends[0]
        for forward, router in ((Forward.IPIP, lab.router), (Forward.NAT, lab.gateway)):
            lab.prepare(forward)
            assert f"via {router.address4}" in backend.run(["ip", "route", "get", str(lab.client.address4)]).stdout
            assert f"via {router.address6}" in backend.run(["ip", "route", "get", str(lab.client.address6)]).stdout
            lab.client.ping(backend.address6)

    def test_gateway_forwards_what_backends_answer_in_the_name_of_its_own_vip(self, two_armed: MakeLaboratory) -> None:
        lab = two_armed(backends=1)
        lab.prepare(Forward.DSR)
        lab.gateway.shell(f"ip addr add {VIP4} dev eth0; ip addr add {VIP6} dev eth0 nodad")
        with (
            lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
            lab.backends[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as there,
        ):
            here.bind((str(lab.client.address4), 0))
            here.settimeout(2)
            there.bind((str(VIP4), 5000))
            there.sendto(b"from the VIP", here.getsockname())
            assert here.recvfrom(100) == (b"from the VIP", (str(VIP4), 5000))


class TestWebServer:
    def test_answers_by_plain_routing(self, two_armed: MakeLaboratory) -> None:
        lab = two_armed(backends=2)
        for backend in lab.backends:
            with WebServer(backend, ports=(80, 8080), https_ports=(443,)):
                for address in (backend.address4, backend.address6):
                    assert lab.client.curl(url(address)).stdout == f"{backend.name}\n"
                    assert lab.client.curl(url(address, scheme="https")).stdout == f"{backend.name}\n"
                    assert len(lab.client.curl(url(address, "/big"), "-o", "-").stdout) == BIG_BYTES
                assert lab.client.curl(f"http://{backend.address4}:8080/").stdout == f"{backend.name}\n"

    def test_health_is_a_toggle(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1)
        with WebServer(lab.backends[0], "a") as server:
            health = url(lab.backends[0].address4, "/healthz")
            status = ("-o", "/dev/null", "-w", "%{http_code}")
            assert lab.client.curl(health, *status).stdout == "200"
            server.fail()
            assert lab.client.curl(health, *status).stdout == "500"
            assert lab.client.curl(url(lab.backends[0].address4)).stdout == "a\n"
            server.recover()
            assert lab.client.curl(health, *status).stdout == "200"

    def test_killed_is_gone_at_once_and_can_start_again(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1)
        server = WebServer(lab.backends[0])
        address = lab.backends[0].address4
        for end in (server.kill, server.stop):
            server.start()
            assert lab.client.accepts(address, 80)
            end()
            assert not server.running
            assert not lab.client.accepts(address, 80)
            assert lab.client.curl(url(address), check=False).returncode == 7

    def test_a_second_one_on_the_port_is_refused(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1)
        with WebServer(lab.backends[0]), pytest.raises(XdplbError, match="port 80 of backend1 is taken"):
            WebServer(lab.backends[0], "other").start()


class TestUdpEcho:
    def test_answers_from_the_address_and_port_it_was_asked_on(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1)
        backend = lab.backends[0]
        lab.prepare(Forward.DSR)
        lab.gateway.shell(f"ip route add {VIP4} via {backend.address4}; ip route add {VIP6} via {backend.address6}")
        with UdpEcho(backend, 8000, 8009):
            targets = (backend.address4, backend.address6, VIP4, VIP6)
            for address, port in itertools.product(targets, (8000, 8009)):
                assert ask(lab.client, address, port, b"hello") == b"backend1:hello"


def ask(client: Host, address: Address, port: int, payload: bytes) -> bytes:
    """Sends a datagram and returns the answer, which has to come from where the question went."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with client.socket(family, socket.SOCK_DGRAM) as question:
        question.settimeout(2)
        question.connect((str(address), port))
        question.send(payload)
        return question.recv(65536)


class TestHttpLoad:
    def test_shows_a_server_die_and_return(self, two_armed: MakeLaboratory) -> None:
        lab = two_armed(backends=1)
        server = WebServer(lab.backends[0], "a")
        server.start()
        with HttpLoad(lab.client, url(lab.backends[0].address6), rate=200) as load:
            load.collect_until(lambda results: len(results) >= 20, "20 requests were made")
            assert {(result.backend, result.status, result.error) for result in load.drain()} <= {("a", 200, None)}
            server.kill()
            bad = load.collect_until(lambda results: any(r.error == "refused" for r in results), "a refusal")
            assert bad[-1].backend is None and bad[-1].status is None
            server.start()
            good = load.collect_until(lambda results: any(r.backend == "a" for r in results[1:]), "success")
        assert good[-1].started_s > bad[-1].started_s
        assert 0 < good[-1].latency_s < 1

    def test_workers_keep_their_connections(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1)
        with (
            WebServer(lab.backends[0]),
            HttpLoad(lab.client, url(lab.backends[0].address4), workers=3, keep_alive=True, rate=300) as load,
        ):
            load.collect_until(lambda results: len(results) >= 60, "60 requests were made")
            connections = lab.client.run(["ss", "-Htn", "state", "established", "dport", "=", ":80"]).stdout
        assert len(connections.splitlines()) == 3
        assert {result.error for result in load} <= {None}

    def test_an_answer_other_than_200_is_an_error(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1)
        with WebServer(lab.backends[0]), HttpLoad(lab.client, url(lab.backends[0].address4, "/missing")) as load:
            (first, *_) = load.collect_until(bool, "the first answer")
        assert (first.status, first.backend, first.error) == (404, None, "status 404")


class TestCommands:
    def test_failures_carry_the_words_of_the_command(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1)
        with pytest.raises(CommandFailed, match=r"gateway: sh .* exit code 3\n.*words"):
            lab.gateway.run(["sh", "-c", "echo words >&2; exit 3"])
        with pytest.raises(CommandFailed, match="not done after"):
            lab.gateway.run(["sleep", "100"], timeout_s=0.1)
        process = lab.gateway.popen(["sh", "-c", "echo last words; exit 4"])
        with pytest.raises(XdplbError, match="ended with 4 before") as failure:
            process.wait_for_line("ready")
        assert failure.value.hint == "last words"

    def test_gateway_has_directories_of_its_own_for_the_daemon(self, one_armed: MakeLaboratory) -> None:
        lab = one_armed(backends=1)
        script = "import os, xdplb; print(*(os.environ[f'XDPLB_{d}_DIRECTORY'] for d in ('RUNTIME', 'STATE', 'PIN')))"
        runtime, state, pins = lab.gateway.run([sys.executable, "-c", script]).stdout.split()
        assert runtime != state
        assert lab.directory in Path(runtime).parents and lab.directory in Path(state).parents
        assert Path(pins) == Path("/sys/fs/bpf") / lab.prefix


class TestCleanUp:
    def test_everything_goes_with_an_exception(self) -> None:
        with pytest.raises(ZeroDivisionError), Laboratory(backends=1) as lab:
            (lab.pins / "abi").mkdir(parents=True)
            WebServer(lab.backends[0]).start()
            stubborn = lab.client.popen(["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 100; done"])
            stubborn.wait_for_line("deaf")
            daemon = "setsid sh -c 'echo $$; exec sleep 1000 >&- 2>&-' </dev/null &"
            daemon_pid = int(lab.gateway.shell(daemon))
            processes = [*lab.client.processes, *lab.backends[0].processes]
            assert len(processes) == 2 and all(process.running for process in processes) and exists(daemon_pid)
            assert len(left_by(lab.prefix)) == 6
            raise ZeroDivisionError
        assert left_by(lab.prefix) == []
        assert not any(process.running for process in processes) and not exists(daemon_pid)

    def test_laboratories_side_by_side_do_not_touch_each_other(self) -> None:
        with Laboratory(backends=1) as outlives:
            with Laboratory(backends=1) as other:
                assert other.prefix != outlives.prefix
            assert left_by(other.prefix) == []
            outlives.client.ping(outlives.backends[0].address4)

    def test_signal_handlers_are_put_back(self) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        with Laboratory(backends=1):
            pass
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before

    def test_a_signal_waits_until_the_uninterrupted_part_is_done(self) -> None:
        done = False
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done = True
        assert done
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


BUSY_OWNER = """
import os, signal, sys, threading
from xdplb.lab.laboratory import HttpLoad, Laboratory, WebServer

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests may have had it ignored
for argument in sys.argv[1:]:
    number, delay_s = argument.split("@")
    timer = threading.Timer(float(delay_s), os.kill, (os.getpid(), int(number)))
    timer.daemon = True
    timer.start()
with Laboratory(backends=2) as lab:
    servers = [WebServer(backend) for backend in lab.backends]
    for server in servers:
        server.start()
    with HttpLoad(lab.client, f"http://{lab.backends[0].address4}/", rate=50) as load:
        pids = [process.pid for host in lab.hosts.values() for process in host.processes]
        print(lab.prefix, *pids, flush=True)
        signal.pause()
"""


Owner = subprocess.Popen[str]


@pytest.fixture
def start_owner() -> Iterator[Callable[..., Owner]]:
    """Starts a process that owns a busy laboratory and sends itself signals, each given as NUMBER@SECONDS."""
    environment = {**os.environ, "PYTHONPATH": str(Path(xdplb.__file__).parent.parent)}
    with contextlib.ExitStack() as ends:

        def start(*signals: str) -> Owner:
            command = [sys.executable, "-c", BUSY_OWNER, *signals]
            owner = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            ends.callback(owner.communicate)
            ends.callback(owner.kill)
            return owner

        yield start


def guard_of(owner: Owner) -> int:
    """Its process id."""
    children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"remains.py" in Path(f"/proc/{pid}/cmdline").read_bytes())


class TestInterruption:
    @pytest.mark.parametrize("moment_s", [0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8])
    def test_ctrl_c_twice_leaves_nothing(self, start_owner: Callable[..., Owner], moment_s: float) -> None:
        """Some of these moments lie in the set-up, some after it; the second one in the taking down."""
        owner = start_owner(f"2@{moment_s}", f"2@{moment_s + 0.02}", f"2@{moment_s + 0.06}")
        output, errors = owner.communicate(timeout=30)
        assert owner.returncode != 0 and "KeyboardInterrupt" in errors
        assert left_by(f"xdplb-lab-{owner.pid}-") == []
        assert not any(exists(int(pid)) for pid in output.split()[1:])

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    @pytest.mark.parametrize("moment_s", [0.05, 0.6])
    def test_sigterm_and_sighup_leave_nothing(
        self, start_owner: Callable[..., Owner], number: int, moment_s: float
    ) -> None:
        owner = start_owner(f"{int(number)}@{moment_s}")
        output, _errors = owner.communicate(timeout=30)
        assert owner.returncode == 128 + number
        assert left_by(f"xdplb-lab-{owner.pid}-") == []
        assert not any(exists(int(pid)) for pid in output.split()[1:])

    def test_kill_9_leaves_nothing_either(self, start_owner: Callable[..., Owner]) -> None:
        owner = start_owner()
        assert owner.stdout is not None
        prefix, *pids = owner.stdout.readline().split()
        guard = guard_of(owner)
        assert len(left_by(prefix)) == 6 and len(pids) == 3 and all(exists(int(pid)) for pid in (guard, *pids))
        owner.kill()
        await_until(lambda: left_by(prefix) == [], "its guard has removed it")
        await_until(lambda: not any(exists(int(pid)) for pid in (guard, *pids)), "its processes ended")

    def test_where_the_guard_is_killed_too_the_next_laboratory_removes_the_rest(
        self, start_owner: Callable[..., Owner]
    ) -> None:
        owner = start_owner()
        assert owner.stdout is not None
        prefix, *pids = owner.stdout.readline().split()
        os.kill(guard_of(owner), signal.SIGKILL)
        owner.kill()
        await_until(lambda: not any(exists(int(pid)) for pid in pids), "its processes ended")
        with Laboratory(backends=1) as alive:
            assert left_by(prefix) == []
            remove_stale()
            alive.client.ping(alive.backends[0].address4)

    def test_a_guard_ends_with_the_last_laboratory(self) -> None:
        def guards() -> int:
            return sum(b"remains.py\0%d" % os.getpid() in line for line in command_lines())

        before = guards()
        with Laboratory(backends=1), Laboratory(backends=1):
            assert guards() == 1
        assert guards() == before

    def test_a_pid_used_again_does_not_protect_what_its_former_owner_left(self) -> None:
        directory = Path(f"/run/xdplb-lab-{os.getpid()}-99999")
        directory.mkdir()
        (directory / "owner").write_text("1")
        remove_stale()
        assert not directory.exists()

    def test_nobody_judges_what_is_of_another_container(self) -> None:
        """That has a /run of its own, or else PIDs of its own."""
        prefix, other = (f"xdplb-lab-{2**22 + 1}-{number}" for number in (1, 2))
        (pins := Path("/sys/fs/bpf") / prefix).mkdir()
        (directory := Path("/run") / other).mkdir()
        try:
            (directory / "owner").write_text("1 pid:[1]")
            remove_stale()
            assert pins.exists() and directory.exists()
        finally:
            pins.rmdir()
            shutil.rmtree(directory)


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield path.read_bytes()


def test_what_was_mounted_in_a_laboratory_goes_with_it(able: None) -> None:
    """A test that is killed cannot unmount it."""
    with Laboratory(backends=1) as lab:
        for place, kind in ((lab.gateway.directory / "run", "tmpfs"), (lab.pins, "bpf"), (lab.pins, "bpf")):
            place.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", kind, kind, place], check=True)
    assert lab.remains() == []
    assert lab.prefix not in Path("/proc/self/mounts").read_text()
