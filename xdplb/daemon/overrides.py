"""What operators set by hand (drain, maint, weight), remembered over restarts until the file changes that backend."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from xdplb.errors import XdplbError
from xdplb.model import Admin, Backend, BackendKey, Config
from xdplb.paths import Instance, replace_file, state_directory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Override:
    """`weight` is None where the file's holds. `written` is the backend as the file had it then."""

    admin: Admin
    weight: int | None
    written: str


def fingerprint(backend: Backend) -> str:
    return f"{backend.address} {backend.port} {backend.weight} {backend.backup}"


class Overrides:
    """The overrides of one instance, kept in `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._overrides: dict[BackendKey, Override] = {}
        self._read()

    @classmethod
    def of(cls, instance: Instance) -> Overrides:
        """Those of an instance. An earlier version kept them in a file of another name."""
        path = state_directory() / f"{instance.name}.overrides.json"
        former = path.with_name(f"{instance.name}.steering.json")
        if former.exists() and not path.exists():
            former.replace(path)
        return cls(path)

    @property
    def unreadable(self) -> Path:
        """Where a file is put that cannot be understood: balancing does not wait for somebody to mend it."""
        return self._path.with_name(f"{self._path.name}.unreadable")

    def set(self, key: BackendKey, backend: Backend, admin: Admin, weight: int | None) -> None:
        """Remembers it, on disk before it returns. The file's own values need no memory.

        XdplbError where it cannot be written: then nothing is remembered of it, now or later.
        """
        wanted = {name: override for name, override in self._overrides.items() if name != key}
        if admin is not Admin.ACTIVE or weight is not None:
            wanted[key] = Override(admin, weight, fingerprint(backend))
        self._keep(wanted)

    def held(self, config: Config) -> dict[BackendKey, Override]:
        """The overrides that hold under `config`: not those of backends that the file changed since."""
        wanted = {key.service for key in self._overrides}
        backends = {BackendKey(s.name, b.name): b for s in config.services if s.name in wanted for b in s.backends}
        return {k: s for k, s in self._overrides.items() if k in backends and fingerprint(backends[k]) == s.written}

    def forget_others(self, config: Config) -> None:
        """Forgets those that do not hold under `config`, which is in force now. XdplbError as above."""
        held = self.held(config)
        if held != self._overrides:
            self._keep(held)

    def _read(self) -> None:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            for name, (admin, weight, written) in data.items():
                if not isinstance(weight, int | None):
                    raise ValueError(f"{weight!r} is no weight")
                self._overrides[BackendKey(*name.split("/", 1))] = Override(Admin(admin), weight, written)
        except FileNotFoundError:
            return
        except OSError as error:
            hint = f"look at it: ls -l {self._path}"
            raise XdplbError(f"{self._path} cannot be read: {error.strerror}", hint) from error
        except (ValueError, TypeError, AttributeError) as error:
            log.warning("%s cannot be understood: %s", self._path, error)
            self._overrides = {}
            self._path.replace(self.unreadable)

    def _keep(self, overrides: dict[BackendKey, Override]) -> None:
        told = {str(key): [kept.admin, kept.weight, kept.written] for key, kept in overrides.items()}
        replace_file(self._path, json.dumps(told))
        self._overrides = overrides
