"""TLS of https checks: the handshake over a connection that does not block, and why one failed, in words."""

from __future__ import annotations

import ipaddress
import re
import ssl
import warnings
from collections.abc import Generator
from contextlib import suppress
from functools import lru_cache
from socket import socket

from xdplb.checks.attempt import CheckFailed
from xdplb.checks.endpoint import Endpoint
from xdplb.model import Tls, TlsVersion

_VERSIONS = {
    TlsVersion.TLS1_0: ssl.TLSVersion.TLSv1,
    TlsVersion.TLS1_1: ssl.TLSVersion.TLSv1_1,
    TlsVersion.TLS1_2: ssl.TLSVersion.TLSv1_2,
    TlsVersion.TLS1_3: ssl.TLSVersion.TLSv1_3,
}
_OTHER_VERSION = {"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "NO_PROTOCOLS_AVAILABLE"}
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}


class Handshake:
    """The client's side of TLS with one endpoint. ValueError where its name cannot be one."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._tls = endpoint.check.tls
        self._context = _context(self._tls)
        name = server_name(self._tls.sni or endpoint.host)
        self._name = name or (str(endpoint.address) if self._tls.verify else None)

    def __call__(self, connection: socket) -> Generator[None, int, ssl.SSLSocket]:
        """The connection, secured; it takes the place of the one given. CheckFailed where there is no TLS."""
        secured = self._context.wrap_socket(
            connection, do_handshake_on_connect=False, server_hostname=self._name, suppress_ragged_eofs=True
        )
        try:
            while True:
                try:
                    secured.do_handshake()
                    return secured
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    yield
        except ssl.SSLError as error:
            secured.close()
            raise CheckFailed(cause(error, self._tls)) from None
        except BaseException:
            secured.close()
            raise


def server_name(host: str | None) -> str:
    """The name for SNI, "" for none: RFC 6066 section 3 allows no port, no address and no final dot there.

    ValueError for what cannot be a name.
    """
    if not host or host.startswith("["):
        return ""
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 else host
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return ""
    try:
        encoded = name.rstrip(".").encode("idna").decode()
    except UnicodeError as error:
        raise ValueError(f"{host!r} cannot be a name in TLS: {error}") from None
    if not re.fullmatch(r"[!-~]*", encoded):
        raise ValueError(f"{host!r} cannot be a name in TLS")
    return encoded


def cause(error: ssl.SSLError, tls: Tls) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "connection closed in the TLS handshake"
    reason = error.reason or ""
    if reason in _OTHER_VERSION:
        return f"the server does not speak TLS {tls.min_version} or later ({_words(reason)}); see tls.min_version"
    if reason in _NO_TLS:
        return f"the server does not speak TLS ({_words(reason)})"
    return _words(reason) or str(error)


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower().replace("tlsv1", "TLS").replace("sslv3", "TLS")


@lru_cache(maxsize=64)
def _context(tls: Tls) -> ssl.SSLContext:
    """Without `verify` it takes any certificate: such a check asks whether the server works, not who it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.authorities:
        context.load_verify_locations(cadata=tls.authorities)
    else:
        context.load_default_certs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the old versions, which somebody asked for
        context.minimum_version = _VERSIONS[tls.min_version]
    if tls.min_version in (TlsVersion.TLS1_0, TlsVersion.TLS1_1):
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # OpenSSL 3 has neither version at a higher level
    return context
