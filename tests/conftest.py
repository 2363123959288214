"""What all tests share: the same surroundings everywhere, and whether BPF programs can be loaded here at all."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aftermath
import pytest
from hypothesis import HealthCheck, settings
from side_by_side import pytest_collection_modifyitems, pytest_runtest_protocol

from xdplb.dataplane.loader import BPFFS, ensure_bpffs, load_programs
from xdplb.errors import XdplbError

__all__ = ["pytest_collection_modifyitems", "pytest_runtest_protocol"]
"""Hooks, which pytest finds here."""

pytest.register_assert_rewrite("packets", "reference", "world")

_LEFT_ALONE = {signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ}
"""The first is nohup's affair, the others Python itself ignores and restores in its children."""
_PRIVATE = re.compile(
    r"XDPLB_.*|COLUMNS|LINES|FORCE_COLOR|NO_COLOR|CLICOLOR.*|TTY_.*|NOTIFY_SOCKET|WATCHDOG_.*|SUDO_.*|.*_proxy|.*_PROXY"
    r"|LC_.*|LANGUAGE|PYTHONWARNINGS|PYTHONDEVMODE|PYTHONOPTIMIZE|HYPOTHESIS_.*"
)
"""Variables by which a user, a terminal or a service manager changes what programs do or print."""

settings.register_profile(
    "the same examples",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
"""No test fails because the machine is busy, or because other examples were drawn than last time."""
settings.register_profile("others", settings.get_profile("the same examples"), derandomize=False)
"""For whoever searches: `--hypothesis-profile=others`."""

_COMPILED = Path(__file__).resolve().parents[1] / ".bpf_cache"
"""Programs that any run of tests compiled, here: all runs share them, and what changes is compiled again."""
_PROBE = "int probe(struct xdp_md *ctx) { return XDP_PASS; }"


def pytest_configure() -> None:
    """Tests see the same surroundings whoever starts them, and so do the programs that they start."""
    _restore_signals()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in filter(_PRIVATE.fullmatch, list(os.environ)):
        del os.environ[name]
    os.environ.update(LANG="C.UTF-8", TERM="xterm", XDPLB_CACHE_DIRECTORY=str(_COMPILED))
    os.umask(0o022)
    settings.load_profile("the same examples")
    aftermath.begin()
    with contextlib.suppress(XdplbError):  # here, for two processes of tests might both find that it is missing
        ensure_bpffs(BPFFS)


def _restore_signals() -> None:
    """A shell's background job has SIGINT ignored, and so may what cron or a CI starts: no Ctrl-C would reach it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - _LEFT_ALONE:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _why_no_bpf() -> str | None:
    if os.geteuid() != 0:
        return "only root may load BPF programs (run the tests with sudo)"
    try:
        load_programs(_PROBE, [], ["probe"]).close()
    except XdplbError as error:
        return f"{error.message} ({error.hint})"
    return None


@pytest.fixture(scope="session")
def bpf_able() -> None:
    """Skips, with the reason found by trying, where no BPF program can be loaded."""
    if reason := _why_no_bpf():
        pytest.skip(reason)


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory into which everybody may look. Pytest's own are not: another run of it closes them again."""
    with tempfile.TemporaryDirectory(prefix="xdplb-test-") as path:
        Path(path).chmod(0o755)
        yield Path(path)
