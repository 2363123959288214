"""A laboratory carries XDP: what a program on the gateway redirects arrives, in native and in generic mode."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from xdplb.lab.laboratory import Laboratory, Shape

pytest.importorskip("bcc", reason="bcc is not installed")

DISCARD_PORT = 9
FLAGS = {"native": 1 << 2, "generic": 1 << 1}

ECHO = """
import os, signal, sys
from bcc import BPF

PROGRAM = r'''
#define SWAP(a, b, size) for (int i = 0; i < size; i++) { u8 byte = p[a + i]; p[a + i] = p[b + i]; p[b + i] = byte; }

int echo(struct xdp_md *ctx)
{
	unsigned char *p = (void *)(long)ctx->data;

	if (p + 42 > (unsigned char *)(long)ctx->data_end)
		return XDP_PASS;
	if (p[12] != 0x08 || p[13] != 0x00 || p[23] != 17 || p[37] != 9)
		return XDP_PASS;
	SWAP(0, 6, 6)
	SWAP(26, 30, 4)
	SWAP(34, 36, 2)
	return bpf_redirect(ctx->ingress_ifindex, 0);
}
'''
bpf = BPF(text=PROGRAM)
bpf.attach_xdp("eth0", bpf.load_func("echo", BPF.XDP), int(sys.argv[1]))
print("attached", flush=True)
signal.pause()
"""


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("mode", FLAGS)
@pytest.mark.parametrize("shape", Shape)
def test_a_frame_redirected_by_the_gateway_returns_to_the_client(shape: Shape, mode: str) -> None:
    kernel_source = Path(__file__).resolve().parents[2] / "bpf" / "kernel"
    with Laboratory(shape, backends=1) as lab:
        environment = {**os.environ, "BCC_KERNEL_SOURCE": str(kernel_source)}
        program = lab.gateway.popen([sys.executable, "-c", ECHO, str(FLAGS[mode])], env=environment)
        program.wait_for_line("attached", timeout_s=30)
        with lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as question:
            question.settimeout(2)
            question.connect((str(lab.gateway.address4), DISCARD_PORT))
            question.send(bytes(1400))
            assert question.recv(2000) == bytes(1400)
