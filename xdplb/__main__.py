"""The command `xdplb`, and `python -m xdplb`: what has to be so before anything else is imported."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """The console script."""
    if "up" in sys.argv[1:2]:  # until the daemon, which reloads then, is there to hear it
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    open_streams()
    from xdplb.cli import commands

    commands.main()


def open_streams() -> None:
    """Those that are closed become /dev/null, or the next file that is opened would be the standard output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            while (opened := os.open(os.devnull, os.O_RDWR)) < number:
                pass
            setattr(sys, name, os.fdopen(opened, "w" if number else "r"))


if __name__ == "__main__":
    main()
