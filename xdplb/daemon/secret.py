"""The secret behind the hash key: the configured one, or one that is drawn at the first start and kept."""

from __future__ import annotations

import logging
import re
import secrets
from pathlib import Path

from xdplb.core.hash_key import HashKey
from xdplb.errors import XdplbError
from xdplb.model import Config
from xdplb.paths import replace_file, state_directory

log = logging.getLogger(__name__)

_SECRET = re.compile(rb"[!-~]{16,}")


def hash_key(config: Config) -> HashKey:
    """The configured secret, or the one drawn at the first start and kept: another one would move every flow."""
    if config.hash_key:
        return HashKey.derive(config.hash_key)
    path = state_directory() / "hash_key"
    try:
        return HashKey.derive(_kept(path) or _draw(path))
    except (OSError, XdplbError) as error:
        raise XdplbError(
            f"the hash key cannot be kept in {path}: {getattr(error, 'message', error)}",
            "make that possible, or write `hash_key: SECRET` into the configuration",
        ) from error


def _kept(path: Path) -> str:
    """Empty where there is none, or what a power cut left of one. Nobody else may read it from now on."""
    if not path.exists():
        return ""
    path.chmod(0o600)
    secret = path.read_bytes().strip()
    if not _SECRET.fullmatch(secret):
        log.warning("%s holds no hash key: drawing another, which hashes all flows anew", path)
        return ""
    return secret.decode("ascii")


def _draw(path: Path) -> str:
    secret = secrets.token_hex(32)
    replace_file(path, secret + "\n", mode=0o600)
    return secret
