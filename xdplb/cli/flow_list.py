"""`xdplb flows`: the remembered flows, read from the flow cache in use: no daemon is needed."""

from __future__ import annotations

import os

import numpy as np

from xdplb.abi import MAX_BACKEND_IDS, FlowState, FlowTimes
from xdplb.api.messages import Flow, Flows
from xdplb.core.flow_cache import Flows as Decoded
from xdplb.core.flow_cache import Words
from xdplb.dataplane import syscall
from xdplb.dataplane.clock import clock
from xdplb.dataplane.counters import open_maps, running
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import UsageError, XdplbError
from xdplb.paths import Instance


def read_flows(instance: Instance, service: str | None = None, backend: str | None = None) -> Flows:
    """`xdplb flows -o json`: those of one service, of the backends of one name, or all.

    UsageError where there is no such service or backend; DaemonUnreachable, NotPrivileged as for the counters.
    """
    manifest = running(instance)
    chosen = choose(manifest, service, backend)
    words = _read_words(manifest)
    times = manifest.times
    if times is None:
        raise XdplbError("the packet path is of another version of xdplb", f"xdplb up {instance.name} takes it over")
    time = clock(times.tick_shift)
    return listing(manifest, chosen, words, times, time.tick, time.tick_s)


def choose(manifest: Manifest, service: str | None, backend: str | None) -> set[tuple[str, str]]:
    """The (service, backend)s that are meant. UsageError where there are none of the name."""
    services = manifest.services
    if service is not None and service not in services:
        raise UsageError(f"there is no service '{service}'", f"there are: {', '.join(services) or 'none'}")
    known = [(name, member) for name in services if service in (None, name) for member in services[name].backends]
    chosen = {key for key in known if backend in (None, key[1])}
    if backend is not None and not chosen:
        names = ", ".join(dict.fromkeys(member for _, member in known)) or "none"
        whose = f"{service} has no backend" if service else "no service has a backend"
        raise UsageError(f"{whose} '{backend}'", f"there are: {names}")
    return chosen


def listing(
    manifest: Manifest, chosen: set[tuple[str, str]], words: Words, times: FlowTimes, tick: int, tick_s: float
) -> Flows:
    """Live flows by service, backend, and idle time; `words` is the whole cache, `tick` is now."""
    used = Decoded.decode(words[words != 0], tick)
    of_service = {id_: record for record in manifest.services.values() for id_ in record.backends.values()}
    keep_idle = np.zeros(MAX_BACKEND_IDS, np.uint16)
    known = np.zeros(MAX_BACKEND_IDS, np.bool_)
    for id_, owner in of_service.items():
        known[id_], keep_idle[id_] = True, owner.keep_idle
    alive = used.live(times, keep_idle[used.backend]) & known[used.backend]
    flows: list[Flow] = []
    for service, record in manifest.services.items():
        for backend, id_ in record.backends.items():
            if (service, backend) not in chosen:
                continue
            places = np.flatnonzero(alive & (used.backend == id_))
            flows += [
                {
                    "service": service,
                    "backend": backend,
                    "state": FlowState(int(used.state[place])).name.lower(),
                    "idle_s": round(int(used.idle[place]) * tick_s),
                    "slot": int(used.fingerprint[place]) & (record.slot_count - 1),
                    "fingerprint": f"{int(used.fingerprint[place]):08x}",
                }
                for place in places[np.argsort(used.idle[places], kind="stable")]
            ]
    return {"capacity": len(words), "live": int(np.count_nonzero(alive)), "flows": flows}


def _read_words(manifest: Manifest) -> Words:
    descriptor = open_maps(manifest, ["flow_sets"])["flow_sets"]
    try:
        with syscall.map_memory(descriptor) as memory:
            return np.frombuffer(bytes(memory), np.uint64)
    finally:
        os.close(descriptor)
