"""Every error a person may see.

    XdplbError                  exit 1   something failed
    ├── UsageError              exit 2   the command line makes no sense
    ├── ConfigError             exit 3   the configuration file is not valid; carries every mistake
    ├── DaemonUnreachable       exit 4   no daemon answers on the control socket
    ├── NotPrivileged           exit 5   root, or a capability, is missing
    └── NotCapable              exit 6   the interface, the kernel or the host cannot do it
        ├── ForeignProgram               another XDP program sits on the interface
        └── CompileError                 bcc, clang or the verifier said no; carries their words

An error says what failed and where (`message`), and what to do about it (`hint`). The command line prints both; a
traceback is for bugs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class XdplbError(Exception):
    """Base of all errors meant for people. `message` says what failed and where; `hint` what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(XdplbError):
    exit_code = 2


class ConfigError(XdplbError):
    """The configuration is not valid. `mistakes` holds one line for each, `FILE:LINE: path: what is wrong`."""

    exit_code = 3

    def __init__(self, mistakes: Sequence[str], hint: str = "") -> None:
        super().__init__("\n".join(mistakes), hint)
        self.mistakes = tuple(mistakes)


class DaemonUnreachable(XdplbError):
    exit_code = 4


class NotPrivileged(XdplbError):
    exit_code = 5


class NotCapable(XdplbError):
    exit_code = 6


class ForeignProgram(NotCapable):
    """An XDP program that is not ours is attached to the interface."""


class CompileError(NotCapable):
    """The BPF program did not compile or load. `log` is what clang or the verifier printed."""

    def __init__(self, message: str, hint: str = "", log: str = "") -> None:
        super().__init__(message, hint)
        self.log = log


BY_EXIT_CODE: dict[int, type[XdplbError]] = {
    1: XdplbError,
    2: UsageError,
    4: DaemonUnreachable,
    5: NotPrivileged,
    6: NotCapable,
}
"""To raise on the client's side of the control socket what the daemon raised on its own (ConfigError travels by its
mistakes).
"""
