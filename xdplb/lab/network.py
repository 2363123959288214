"""The laboratory's network on paper: hosts, cables, addresses and the shell scripts that make them. Runs nothing.

    one-armed   client ─┐
                        ├─ switch ─ backend1 … backendN          everything on BACK
               gateway ─┘  (eth0)

    two-armed   client ── eth0 gateway eth1 ── switch ── backend1 … backendN
                     FRONT               BACK

A routed client has a router in front of it (client ── FAR ── router), which then takes the client's place above.

Every cable is a veth pair without offloads, so that checksums are complete and segments have their real size when XDP
sees them. Where the *other* end may carry an XDP program, GRO is on: veth then delivers what that program redirects.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from xdplb.model import Address, Forward

NO_ROUTES = ["route replace unreachable 0.0.0.0/0", "route replace unreachable ::/0"]
"""Of backends that know nobody beyond their own segment, as full NAT takes them."""


class Shape(enum.StrEnum):
    ONE_ARMED = "one-armed"
    TWO_ARMED = "two-armed"


@dataclass(frozen=True, slots=True)
class Subnet:
    """A segment in both families. Host 11 is 10.0.0.11 and fd00::11: the IPv6 one reads the same, it is not 0x0b."""

    network4: IPv4Network
    network6: IPv6Network

    def address4(self, number: int) -> IPv4Address:
        return self.network4[number]

    def address6(self, number: int) -> IPv6Address:
        return self.network6[int(str(number), 16)]


BACK = Subnet(IPv4Network("10.0.0.0/24"), IPv6Network("fd00::/64"))
FRONT = Subnet(IPv4Network("10.1.0.0/24"), IPv6Network("fd00:1::/64"))
FAR = Subnet(IPv4Network("10.2.0.0/24"), IPv6Network("fd00:2::/64"))

GATEWAY_NUMBER = 1
FIRST_BACKEND_NUMBER = 11
CLIENT_NUMBER = 100
ROUTER_NUMBER = 254
MOST_BACKENDS = CLIENT_NUMBER - FIRST_BACKEND_NUMBER

VIP4 = IPv4Address("203.0.113.10")
VIP6 = IPv6Address("2001:db8::10")
VIPS: tuple[Address, ...] = (VIP4, VIP6)
"""Any other address works as well: the client's default route leads to the gateway."""


@dataclass(frozen=True, slots=True)
class Port:
    """One end of a cable. `subnet` is None for a port of the switch. `gro` says whether the other end may carry XDP."""

    host: str
    interface: str
    subnet: Subnet | None
    number: int
    mtu: int
    gro: bool

    @property
    def address4(self) -> IPv4Address:
        return self._subnet.address4(self.number)

    @property
    def address6(self) -> IPv6Address:
        return self._subnet.address6(self.number)

    @property
    def _subnet(self) -> Subnet:
        if self.subnet is None:
            raise ValueError(f"{self.interface} of {self.host} is a port of the switch: it has no address")
        return self.subnet


@dataclass(frozen=True, slots=True)
class Route:
    """`subnet` is None for the default route. The next hop is host `via` of the segment `on`."""

    subnet: Subnet | None
    on: Subnet
    via: int


@dataclass(frozen=True, slots=True)
class Step:
    """A shell script to run in the network namespace of `host`."""

    host: str
    script: str


@dataclass(frozen=True, slots=True)
class Topology:
    """What a laboratory consists of. `backend_mtu` holds for the cables of backends and the gateway's towards them."""

    shape: Shape = Shape.ONE_ARMED
    backends: int = 3
    routed_client: bool = False
    backend_mtu: int = 1500

    def __post_init__(self) -> None:
        if not 1 <= self.backends <= MOST_BACKENDS:
            raise ValueError(f"a laboratory has 1 to {MOST_BACKENDS} backends, not {self.backends}")
        if self.backend_mtu < 1280:
            raise ValueError(f"backend_mtu is {self.backend_mtu}; IPv6 needs at least 1280")

    @property
    def backend_names(self) -> tuple[str, ...]:
        return tuple(f"backend{n}" for n in range(1, self.backends + 1))

    @property
    def hosts(self) -> tuple[str, ...]:
        router = ("router",) if self.routed_client else ()
        return ("client", *router, "gateway", "switch", *self.backend_names)

    @property
    def client_side(self) -> Subnet:
        """The segment on which the gateway meets the client, or the client's router."""
        return BACK if self.shape is Shape.ONE_ARMED else FRONT

    @property
    def gateway_interfaces(self) -> tuple[str, ...]:
        return ("eth0",) if self.shape is Shape.ONE_ARMED else ("eth0", "eth1")

    def cables(self) -> list[tuple[Port, Port]]:
        """Both ends of every cable; the first end's namespace is where the pair is created."""
        two_armed = self.shape is Shape.TWO_ARMED
        uplink = self._client_uplink(gro=two_armed)
        cables = []
        if self.routed_client:
            far = Port("client", "eth0", FAR, CLIENT_NUMBER, 1500, gro=False)
            cables.append((Port("router", "eth1", FAR, ROUTER_NUMBER, 1500, gro=False), far))
        if two_armed:
            cables.append((Port("gateway", "eth0", FRONT, GATEWAY_NUMBER, 1500, gro=False), uplink))
        else:
            cables.append((_switch_port(uplink.host, uplink.mtu, gro=False), uplink))
        inner = Port("gateway", self.gateway_interfaces[-1], BACK, GATEWAY_NUMBER, self.backend_mtu, gro=False)
        cables.append((_switch_port("gateway", self.backend_mtu, gro=True), inner))
        for number, name in enumerate(self.backend_names, FIRST_BACKEND_NUMBER):
            port = Port(name, "eth0", BACK, number, self.backend_mtu, gro=False)
            cables.append((_switch_port(name, self.backend_mtu, gro=True), port))
        return cables

    def _client_uplink(self, *, gro: bool) -> Port:
        host, number = ("router", ROUTER_NUMBER) if self.routed_client else ("client", CLIENT_NUMBER)
        return Port(host, "eth0", self.client_side, number, 1500, gro=gro)

    def ports(self, host: str) -> tuple[Port, ...]:
        """The ports of a host, by interface name."""
        ports = (port for cable in self.cables() for port in cable if port.host == host)
        return tuple(sorted(ports, key=lambda port: port.interface))

    def routes(self, host: str) -> list[Route]:
        if host == "client":
            return [
                Route(None, FAR, ROUTER_NUMBER) if self.routed_client else Route(None, self.client_side, GATEWAY_NUMBER)
            ]
        if host == "router":
            return [Route(None, self.client_side, GATEWAY_NUMBER)]
        if host == "gateway":
            return [Route(FAR, self.client_side, ROUTER_NUMBER)] if self.routed_client else []
        return [] if host == "switch" else [Route(None, BACK, GATEWAY_NUMBER)]

    def steps(self, prefix: str) -> list[Step]:
        """The scripts that turn empty namespaces, named PREFIX-HOST, into this network, in order."""
        settings = [Step(host, _sysctl_script(host)) for host in self.hosts]
        links: dict[str, list[str]] = {"switch": list(_BRIDGE)}
        for a, b in self.cables():
            peer = f"peer name {b.interface} mtu {b.mtu} netns {prefix}-{b.host}"
            links.setdefault(a.host, []).append(f"link add {a.interface} mtu {a.mtu} type veth {peer}")
        cables = [Step(host, ip_batch(lines)) for host, lines in links.items()]
        addresses = [self._bring_up(host) for host in self.hosts]
        return [*settings, *cables, *addresses, *map(self._set_offloads, self.hosts)]

    def _bring_up(self, host: str) -> Step:
        lines = ["link set lo up"]
        for port in self.ports(host):
            lines.append(f"link set {port.interface} up" + (" master bridge" if host == "switch" else ""))
            if port.subnet is not None:
                lines.append(f"addr add {port.address4}/{port.subnet.network4.prefixlen} dev {port.interface}")
                lines.append(f"addr add {port.address6}/{port.subnet.network6.prefixlen} dev {port.interface} nodad")
        for route in self.routes(host):
            subnet4, subnet6 = (
                ("0.0.0.0/0", "::/0") if route.subnet is None else (route.subnet.network4, route.subnet.network6)
            )
            lines.append(f"route add {subnet4} via {route.on.address4(route.via)}")
            lines.append(f"route add {subnet6} via {route.on.address6(route.via)}")
        return Step(host, ip_batch(lines))

    def _set_offloads(self, host: str) -> Step:
        """veth tells its peer that it takes redirected frames only if GRO is switched on while it is up."""
        return Step(
            host,
            "".join(
                f"ethtool -K {port.interface} gro {'on' if port.gro else 'off'} tx off tso off gso off\n"
                for port in self.ports(host)
            ),
        )

    def forward_steps(self, forward: Forward, vips: Iterable[Address]) -> list[Step]:
        """Makes backends, and the gateway as their router, fit for a forward mode; may follow another mode's steps."""
        nat = forward.translates
        lines = ["addr flush dev lo scope global"]
        if not nat:
            lines += [f"addr add {vip} dev lo" + (" nodad" if vip.version == 6 else "") for vip in vips]
        lines += NO_ROUTES if forward is Forward.FULL_NAT else self._return_routes(nat)
        backends = [Step(name, ip_batch(lines)) for name in self.backend_names]
        # Backends that answer as the VIP and have the gateway as their router send it packets from its own address.
        accept_local = f"echo {int(not nat)} > /proc/sys/net/ipv4/conf/all/accept_local\n"
        return [*backends, Step("gateway", accept_local)]

    def _return_routes(self, nat: bool) -> list[str]:
        """NAT replies must pass the gateway, even to a client on the same segment; others take the shortest way."""
        one_armed = self.shape is Shape.ONE_ARMED
        by_router = one_armed and self.routed_client and not nat
        next_hop = ROUTER_NUMBER if by_router else GATEWAY_NUMBER
        via4, via6 = BACK.address4(next_hop), BACK.address6(next_hop)
        lines = [f"route replace 0.0.0.0/0 via {via4}", f"route replace ::/0 via {via6}"]
        if one_armed and not self.routed_client:
            hop4, hop6 = (f" via {via4}", f" via {via6}") if nat else (" dev eth0", " dev eth0")
            lines.append(f"route replace {BACK.address4(CLIENT_NUMBER)}/32{hop4}")
            lines.append(f"route replace {BACK.address6(CLIENT_NUMBER)}/128{hop6}")
        return lines


def ip_batch(lines: Iterable[str]) -> str:
    """A shell command that hands these lines to one `ip`, which stops at the first that fails."""
    return "ip -batch - <<'END'\n" + "".join(f"{line}\n" for line in lines) + "END\n"


def _switch_port(host: str, mtu: int, *, gro: bool) -> Port:
    return Port("switch", f"to-{host}", None, 0, mtu, gro)


_BRIDGE = ("link add bridge type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set bridge up")

_SYSCTLS_EVERYWHERE = {
    # No duplicate address detection and no router discovery: an address works as soon as it is there.
    "ipv6/conf/*/accept_dad": "0",
    "ipv6/conf/*/dad_transmits": "0",
    "ipv6/conf/*/accept_ra": "0",
    # IPv4 settings of a new namespace are copies of the machine's own.
    "ipv4/conf/*/rp_filter": "0",
    "ipv4/conf/*/arp_ignore": "0",
    "ipv4/conf/*/arp_announce": "0",
    # One-armed gateways send packets out of the interface they came in by; nobody should learn a shortcut.
    "ipv4/conf/*/send_redirects": "0",
    "ipv4/conf/*/accept_redirects": "0",
    "ipv6/conf/*/accept_redirects": "0",
    # Host.ping uses ICMP sockets.
    "ipv4/ping_group_range": "0 2147483647",
}
_SYSCTLS_ROUTING = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}
_SYSCTLS_OF = {
    "client": {"ipv4/ip_local_port_range": "1024 65535"},
    "router": _SYSCTLS_ROUTING,
    "gateway": _SYSCTLS_ROUTING,
    "switch": {"ipv6/conf/*/disable_ipv6": "1"},
}
# A VIP on the loopback must not be announced to the segment.
_SYSCTLS_BACKEND = {"ipv4/conf/*/arp_ignore": "1", "ipv4/conf/*/arp_announce": "2"}


def _sysctl_script(host: str) -> str:
    """`*` stands for both `all` and `default`; interfaces copy the latter at their creation, so this comes first."""
    settings = _SYSCTLS_EVERYWHERE | _SYSCTLS_OF.get(host, _SYSCTLS_BACKEND)
    return "".join(
        f"echo {value} > /proc/sys/net/{key.replace('*', scope)}\n"
        for key, value in settings.items()
        for scope in (("all", "default") if "*" in key else ("",))
    )
