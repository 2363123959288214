"""What people read where the kernel refuses an XDP program. The kernel's texts are quoted from its drivers."""

from __future__ import annotations

import errno

import pytest

from xdplb.errors import ForeignProgram, NotCapable, NotPrivileged
from xdplb.model import AttachMode
from xdplb.net.attach_errors import Refusal, attach_error
from xdplb.net.next_hops import Interface

ETH0 = Interface(index=2, name="eth0", mac=bytes(6), mtu=9000, kind="", up=True, carrier=True)
TOO_LARGE = "single-buffer XDP requires MTU less than 3506"


def test_the_limit_on_the_mtu_is_the_drivers() -> None:
    error = attach_error(ETH0, AttachMode.NATIVE, Refusal(errno.EINVAL, TOO_LARGE), None)
    assert type(error) is NotCapable
    assert "eth0" in error.message and "9000" in error.message and TOO_LARGE in error.message
    assert error.hint == "lower the MTU of eth0 to 3506, or use --mode generic (slower)"


def test_a_driver_that_names_no_limit() -> None:
    error = attach_error(ETH0, AttachMode.NATIVE, Refusal(errno.ERANGE, "Numerical result out of range"), None)
    assert "MTU" in error.message and "3498" in error.hint


@pytest.mark.parametrize(
    ("mode", "code", "text", "kind", "says"),
    [
        (AttachMode.NATIVE, errno.EPERM, "Operation not permitted", NotPrivileged, "eth0"),
        (AttachMode.GENERIC, errno.EBUSY, "XDP program already attached", ForeignProgram, "id 7"),
        (AttachMode.NATIVE, errno.EBUSY, "Can't replace active BPF XDP link", ForeignProgram, "BPF link"),
        (AttachMode.NATIVE, errno.EOPNOTSUPP, "Operation not supported", NotCapable, "driver has no native XDP"),
        (AttachMode.NATIVE, errno.ENOMEM, "Too few free TX rings available", NotCapable, "Too few free TX rings"),
        (AttachMode.GENERIC, errno.EINVAL, "Invalid argument", NotCapable, "generic mode: Invalid argument"),
    ],
)
def test_each_refusal_has_its_own_words(mode: AttachMode, code: int, text: str, kind: type, says: str) -> None:
    error = attach_error(ETH0, mode, Refusal(code, text), 7)
    assert type(error) is kind
    assert says in error.message and error.hint
