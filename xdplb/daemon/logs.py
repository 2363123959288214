"""Where a daemon's words go."""

from __future__ import annotations

import logging
import os


def log_to_stderr() -> None:
    """By a descriptor of our own: number 2 itself is the compiler's while bcc compiles (dataplane/loader.py)."""
    stream = os.fdopen(os.dup(2), "w", buffering=1)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=stream)
