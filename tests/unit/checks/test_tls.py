"""TLS of https checks: which servers are accepted, and what is said of those that are not."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from probing import in_loop, verdict

from xdplb.checks.endpoint import Endpoint
from xdplb.core.health import CheckResult
from xdplb.model import Check, CheckType, Tls, TlsVersion

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")

_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
_NAMES = "subjectAltName=DNS:www.example.org,IP:127.0.0.1"


@dataclass(frozen=True)
class Certificates:
    """Of one authority: a valid one, and one that expired. Each with its key in the same file."""

    authority: str
    valid: Path
    expired: Path
    alone: Path


def openssl(arguments: str, *more: str) -> None:
    subprocess.run(["openssl", *arguments.split(), *more], check=True, capture_output=True)


_AUTHORITY = """\
[ca]
default_ca = own
[own]
database = {here}/index
rand_serial = yes
new_certs_dir = {here}
certificate = {here}/ca.pem
private_key = {here}/ca.key
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""
"""For `openssl ca`: of the commands that every OpenSSL has, the one that can date a certificate back."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    here = tmp_path_factory.mktemp("certificates")
    openssl(f"req -x509 {_KEY} -subj /CN=authority -days 2 -keyout {here}/ca.key -out {here}/ca.pem")
    (here / "ca.conf").write_text(_AUTHORITY.format(here=here), encoding="ascii")
    (here / "index").touch()
    made = {}
    for name, end in (("valid", "20991231235959Z"), ("expired", "20200102000000Z")):
        openssl(f"req {_KEY} -subj /CN=server -addext {_NAMES} -keyout {here}/{name}.key -out {here}/{name}.csr")
        openssl(
            f"ca -batch -notext -config {here}/ca.conf -startdate 20200101000000Z -enddate {end} "
            f"-in {here}/{name}.csr -out {here}/{name}.crt"
        )
        made[name] = here / f"{name}.pem"
        made[name].write_bytes((here / f"{name}.crt").read_bytes() + (here / f"{name}.key").read_bytes())
    openssl(f"req -x509 {_KEY} -subj /CN=alone -days 2 -keyout {here}/alone.key -out {here}/alone.crt")
    made["alone"] = here / "alone.pem"
    made["alone"].write_bytes((here / "alone.crt").read_bytes() + (here / "alone.key").read_bytes())
    return Certificates((here / "ca.pem").read_text(encoding="ascii"), **made)


@contextlib.contextmanager
def s_server(certificate: Path, *options: str) -> Iterator[int]:
    """openssl's own server, which answers every request with a page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(certificate), "-www", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + 10
            while True:
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert time.monotonic() < end
                time.sleep(0.01)
            yield port
        finally:
            server.kill()


async def result(port: int, tls: Tls, host: str | None = None) -> CheckResult:
    return await verdict("127.0.0.1", port, Check(CheckType.HTTPS, tls=tls, host=host, timeout_s=10))


@in_loop
async def test_a_certificate_does_not_matter_unless_somebody_says_so(certificates: Certificates) -> None:
    for certificate in (certificates.expired, certificates.alone):
        with s_server(certificate) as port:
            assert (await result(port, Tls())).reason == "L7OK/200"


@pytest.mark.parametrize(
    ("certificate", "host", "sni", "reason", "cause"),
    [
        ("valid", "www.example.org", None, "L7OK/200", ""),
        ("valid", "www.example.org:8443", None, "L7OK/200", ""),
        ("valid", "other.example", "www.example.org", "L7OK/200", ""),
        ("valid", None, None, "L7OK/200", ""),
        ("valid", "other.example", None, "L6RSP", "certificate not accepted: Hostname mismatch"),
        ("expired", "www.example.org", None, "L6RSP", "certificate not accepted: certificate has expired"),
        ("alone", "www.example.org", None, "L6RSP", "certificate not accepted: self-signed certificate"),
    ],
)
@in_loop
async def test_who_the_server_is_matters_with_verify(
    certificate: str, host: str | None, sni: str | None, reason: str, cause: str, certificates: Certificates
) -> None:
    """Without a host it is the address that the certificate must name."""
    tls = Tls(verify=True, ca="ca.pem", authorities=certificates.authority, sni=sni)
    with s_server(getattr(certificates, certificate)) as port:
        found = await result(port, tls, host)
    assert found.reason == reason
    assert found.cause.startswith(cause) and bool(found.cause) is bool(cause)


@in_loop
async def test_the_systems_authorities_do_not_know_ours(certificates: Certificates) -> None:
    with s_server(certificates.valid) as port:
        found = await result(port, Tls(verify=True), "www.example.org")
    assert (found.ok, found.reason) == (False, "L6RSP")
    assert found.cause == "certificate not accepted: unable to get local issuer certificate"


@pytest.mark.parametrize("version", ["tls1", "tls1_1"])
@in_loop
async def test_an_old_version_of_tls_is_refused_with_the_reason_and_spoken_on_request(
    version: str, certificates: Certificates
) -> None:
    with s_server(certificates.valid, f"-{version}", "-cipher", "DEFAULT:@SECLEVEL=0") as port:
        refused = await result(port, Tls())
        spoken = await result(port, Tls(min_version=TlsVersion.TLS1_0))
    assert (refused.ok, refused.reason) == (False, "L6RSP")
    assert refused.cause.startswith("the server does not speak TLS 1.2 or later (")
    assert refused.cause.endswith("; see tls.min_version")
    assert (spoken.reason, spoken.cause) == ("L7OK/200", "")


@in_loop
async def test_a_server_below_the_least_version(certificates: Certificates) -> None:
    with s_server(certificates.valid, "-tls1_2") as port:
        found = await result(port, Tls(min_version=TlsVersion.TLS1_3))
        assert found.cause.startswith("the server does not speak TLS 1.3 or later (")
        assert (await result(port, Tls())).reason == "L7OK/200"


@in_loop
async def test_ciphers_in_common_are_missing(certificates: Certificates) -> None:
    with s_server(certificates.valid, "-tls1_2", "-cipher", "NULL-SHA256:@SECLEVEL=0") as port:
        found = await result(port, Tls())
    assert (found.reason, found.cause) == ("L6RSP", "TLS alert handshake failure")


@in_loop
async def test_a_server_that_wants_to_know_who_asks(certificates: Certificates) -> None:
    """In TLS 1.3 it says so only after the handshake. That is the server's word, not this host's trouble."""
    for version in ("-tls1_2", "-tls1_3"):
        with s_server(certificates.valid, version, "-Verify", "1") as port:
            found = await result(port, Tls())
        assert (found.ok, found.reason) == (False, "L6RSP" if version == "-tls1_2" else "L7RSP")
        assert "handshake failure" in found.cause or "certificate required" in found.cause


def test_another_option_is_another_endpoint() -> None:
    """So that no verdict of one is taken for the other's."""
    from ipaddress import ip_address

    options = [
        Tls(),
        Tls(verify=True),
        Tls(verify=True, authorities="x"),
        Tls(sni="a"),
        Tls(min_version=TlsVersion.TLS1_3),
    ]
    endpoints = {Endpoint(ip_address("127.0.0.1"), 443, Check(CheckType.HTTPS, tls=tls)) for tls in options}
    assert len(endpoints) == len(options)
