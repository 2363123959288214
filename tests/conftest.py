"""What all tests share: whether BPF programs can be loaded here at all."""

from __future__ import annotations

import os

import pytest

from xdplb.dataplane.loader import load_programs
from xdplb.errors import XdplbError

pytest.register_assert_rewrite("packets", "reference", "world")

_PROBE = "int probe(struct xdp_md *ctx) { return XDP_PASS; }"


def _why_no_bpf() -> str | None:
    if os.geteuid() != 0:
        return "only root may load BPF programs (run the tests with sudo)"
    try:
        load_programs(_PROBE, [], ["probe"])[0].cleanup()
    except XdplbError as error:
        return f"{error.message} ({error.hint})"
    return None


@pytest.fixture(scope="session")
def bpf_able() -> None:
    """Skips, with the reason found by trying, where no BPF program can be loaded."""
    if reason := _why_no_bpf():
        pytest.skip(reason)
