"""The secret behind the hash key: the configured one, or one that is drawn at the first start and kept."""

from __future__ import annotations

import secrets
from pathlib import Path

from xdplb.core.hash_key import HashKey
from xdplb.errors import XdplbError
from xdplb.model import Config
from xdplb.paths import make_directory, state_directory


def hash_key(config: Config) -> HashKey:
    """The configured secret, or the one drawn at the first start and kept: another one would move every flow."""
    if config.hash_key:
        return HashKey.derive(config.hash_key)
    path = state_directory() / "hash_key"
    try:
        secret = path.read_text(encoding="ascii").strip() if path.exists() else ""
        return HashKey.derive(secret or _draw(path))
    except (OSError, ValueError) as error:
        raise XdplbError(
            f"the hash key cannot be kept in {path}: {error}",
            "make that possible, or write `hash_key: SECRET` into the configuration",
        ) from error


def _draw(path: Path) -> str:
    secret = secrets.token_hex(32)
    make_directory(path.parent)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600)
    fresh.write_text(secret + "\n", encoding="ascii")
    fresh.replace(path)
    return secret
