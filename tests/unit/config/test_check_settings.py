"""The keys of `check`: what each kind takes, and what is said of keys that are not its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from configuring import mistakes, only, service

from xdplb.model import Check, CheckType, CheckVia, DnsRecord, Rcode, Tls, TlsVersion

READ = [
    ("udp", Check(CheckType.UDP)),
    ("ping", Check(CheckType.PING)),
    ("{type: udp, send: hello, expect: {text: pong}}", Check(CheckType.UDP, send=b"hello", answer=b"pong")),
    ("{type: udp, send: {hex: 00 ff}, expect: {hex: FF}}", Check(CheckType.UDP, send=b"\0\xff", answer=b"\xff")),
    ("{type: udp, send: {text: hé}, expect: answer}", Check(CheckType.UDP, send="hé".encode())),
    ("{type: udp, expect: no-refusal}", Check(CheckType.UDP, silence_is_fine=True)),
    ("{type: dns, name: example.org}", Check(CheckType.DNS, name="example.org")),
    (
        "{type: dns, name: _sip._tcp.example.org., record: SRV, expect: 'NOERROR, NXDOMAIN'}",
        Check(
            CheckType.DNS,
            name="_sip._tcp.example.org.",
            record=DnsRecord.SRV,
            rcodes=(Rcode.NOERROR, Rcode.NXDOMAIN),
        ),
    ),
    ("{type: dns, name: ., record: SOA}", Check(CheckType.DNS, name=".", record=DnsRecord.SOA)),
    ("{type: exec, command: [/bin/true, -x, '1']}", Check(CheckType.EXEC, command=("/bin/true", "-x", "1"))),
    ("{type: agent, port: 9707, send: 'web\\n'}", Check(CheckType.AGENT, port=9707, send=b"web\\n")),
    ('{type: agent, port: 9707, send: "web\\n"}', Check(CheckType.AGENT, port=9707, send=b"web\n")),
    ("{type: tcp, via: vip}", Check(CheckType.TCP, via=CheckVia.VIP)),
    ("{type: https, tls: {verify: true}}", Check(CheckType.HTTPS, tls=Tls(verify=True))),
    (
        "{type: https, tls: {sni: a.example, min_version: 1.0}}",
        Check(CheckType.HTTPS, tls=Tls(sni="a.example", min_version=TlsVersion.TLS1_0)),
    ),
    ("{type: https, tls: {min_version: '1.3'}}", Check(CheckType.HTTPS, tls=Tls(min_version=TlsVersion.TLS1_3))),
    *(
        (f"{{type: http, path: '{path}'}}", Check(CheckType.HTTP, path=path))
        for path in ("/?x=a%2Fb", "/a/../b", "/%zz", "//", '/a;b?[c]|{d}^`"<>')
    ),
]

MISTAKES = [
    ("{type: http, path: /a b}", ".path: '/a b' has a blank, which no request can have; write %20"),
    ('{type: http, path: "/a\\tb"}', ".path: '/a\\tb' has the character '\\t', which no request can have; write %09"),
    ('{type: http, path: "/a\\0"}', ".path: '/a\\x00' has the character '\\x00', which no request can have; write %00"),
    ("{type: http, path: /ä}", ".path: /ä has the character 'ä', which no request can have; write %C3%A4"),
    ("{type: http, path: '*'}", ".path: * is not a path; it begins with / and has no spaces"),
    ("{type: tcp, host: a.example}", ".host: host belongs to http and https checks, not to a tcp check"),
    ("{type: http, tls: {verify: true}}", ".tls: tls belongs to https checks, not to an http check"),
    ("{type: http, send: x}", ".send: send belongs to udp and agent checks, not to an http check"),
    ("{type: udp, path: /}", ".path: path belongs to http and https checks, not to a udp check"),
    ("{type: udp, name: a.example}", ".name: name belongs to dns checks, not to a udp check"),
    ("{type: tcp, via: bakend}", ".via: bakend is not a way, did you mean 'backend'?"),
    ("{type: ping, via: vip}", ": a ping check cannot go via: vip; it speaks to no port of the service"),
    ("{type: ping, record: A}", ".record: record belongs to dns checks, not to a ping check"),
    ("{type: ping, port: 80}", ".port: a ping has no port"),
    ("{type: ping, expect: 200}", ".expect: expect belongs to http, https, udp and dns checks, not to a ping check"),
    (
        "{type: agent, port: 1, command: [/x]}",
        ".command: command belongs to exec checks, not to an agent check",
    ),
    ("dns", ": a dns check needs name; write name: example.org"),
    ("exec", ": an exec check needs command; write command: [/usr/local/bin/check, --fast]"),
    ("agent", ": an agent check needs port; write port: 9707"),
    (
        "{type: dns, name: a.example, expect: 200}",
        ".expect: 200 does not name response codes; write NOERROR,NXDOMAIN",
    ),
    (
        "{type: dns, name: a.example, expect: nxdomain}",
        ".expect: nxdomain does not name response codes, did you mean 'NXDOMAIN'?",
    ),
    ("{type: http, expect: NOERROR}", ".expect: NOERROR does not name status codes; write 200, 200-399 or 200,301-302"),
    (
        "{type: udp, expect: 200}",
        ".expect: 200 is no answer; write answer, no-refusal, {text: pong} or {hex: 00ff}",
    ),
    ("{type: udp, expect: {hex: 0}}", ".expect: hex must be text, but is 0; put it in quotes"),
    ("{type: udp, expect: {hex: 0g}}", ".expect: 0g is not hexadecimal; write two digits for each byte"),
    ("{type: udp, expect: {text: ''}}", ".expect: every answer contains no bytes at all; write answer"),
    ("{type: udp, expect: {txt: a}}", ".expect: must be text, {text: hello} or {hex: 00ff}, but is a mapping"),
    ("{port: 010}", ".port: must be a whole number, but is the text 010"),
    ("{rise: 1:20}", ".rise: must be a whole number, but is the text 1:20"),
    ("{fall: 0b11}", ".fall: must be a whole number, but is the text 0b11"),
    ("{type: udp, send: 5}", ".send: must be text, {text: hello} or {hex: 00ff}, but is 5"),
    (f"{{type: udp, send: {'x' * 1201}}}", ".send: 1201 bytes are too many; 1200 are possible"),
    ("{type: dns, name: a..example}", ".name: a..example is not a DNS name; write example.org, in ASCII"),
    ("{type: dns, name: ä.example}", ".name: ä.example is not a DNS name; write example.org, in ASCII"),
    (f"{{type: dns, name: {'x' * 64}}}", f".name: {'x' * 64} is not a DNS name; write example.org, in ASCII"),
    ("{type: dns, name: a.example, record: AAA}", ".record: AAA is not a record type, did you mean 'AAAA'?"),
    (
        "{type: exec, command: /bin/true}",
        ".command: must be a list of a program and its arguments, but is the text /bin/true; "
        "write [/usr/local/bin/check, --fast]",
    ),
    (
        "{type: exec, command: [curl, -f]}",
        ".command: curl is not the whole path of a program; write [/usr/local/bin/check, --fast]. There is no shell",
    ),
    ("{type: exec, command: [/bin/sleep, 1]}", ".command: must be a list of texts, but has 1; put it in quotes"),
    ('{type: exec, command: [/bin/true, "a\\0"]}', ".command: no argument can have a byte of 0"),
    (
        "{type: https, tls: {min_version: 1.4}}",
        ".tls.min_version: 1.4 is not a version of TLS; available: 1.0, 1.1, 1.2, 1.3",
    ),
    ("{type: https, tls: {sni: 10.0.0.1}}", ".tls.sni: 10.0.0.1 cannot be a name in TLS; write example.org"),
    ("{type: https, tls: {verfy: true}}", ".tls: unknown key 'verfy', did you mean 'verify'?"),
    ("{type: https, tls: {verify: 1}}", ".tls.verify: must be true or false, but is 1"),
    ("{type: https, tls: {ca: x.pem}}", ".tls.ca: x.pem is not the whole path of a file"),
    ("{type: https, tls: {ca: /nowhere.pem}}", ".tls.ca: /nowhere.pem cannot be read: no such file or directory"),
    ("{type: https, tls: {ca: /etc/passwd}}", ".tls.ca: /etc/passwd holds no certificates in PEM form"),
    ("{type: https, tls: {ca: /proc/self/exe}}", ".tls.ca: /proc/self/exe holds no certificates in PEM form"),
]


@pytest.mark.parametrize(("written", "check"), READ)
def test_what_a_check_may_say(written: str, check: Check) -> None:
    assert only(service(f"check: {written}")).check == check


@pytest.mark.parametrize(("written", "mistake"), MISTAKES)
def test_what_a_check_may_not_say(written: str, mistake: str) -> None:
    assert mistakes(service(f"check: {written}")) == [f"FILE:5: services[0].check{mistake}"]


def test_a_file_of_authorities_is_part_of_the_configuration(tmp_path: Path) -> None:
    """So that a reload takes a new one, and a broken one is found before."""
    file = tmp_path / "ca.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=ca -days 1 -keyout /dev/null"
    )
    subprocess.run([*command.split(), "-out", str(file)], check=True, capture_output=True)
    found = only(service(f"check: {{type: https, tls: {{verify: true, ca: {file}}}}}")).check.tls
    assert (found.ca, found.authorities) == (str(file), file.read_text(encoding="ascii"))
    assert mistakes(service(f"check: {{type: https, tls: {{ca: {file}}}}}")) == [
        "FILE:5: services[0].check.tls: ca means nothing without verify: true"
    ]


def test_the_defaults_may_hold_what_only_some_services_need() -> None:
    text = "defaults: {check: {path: /a, expect: 204, name: a.example}}\n"
    assert only(text + service("check: dns")).check == Check(CheckType.DNS, path="/a", name="a.example")
    assert only(text + service("check: http")).check == Check(
        CheckType.HTTP, path="/a", name="a.example", expect=((204, 204),)
    )


def test_mistakes_in_the_defaults_are_the_defaults() -> None:
    text = "defaults: {check: {type: dns, name: a.example, expect: 200}}\n" + service()
    assert mistakes(text) == ["FILE:1: defaults.check.expect: 200 does not name response codes; write NOERROR,NXDOMAIN"]


@pytest.mark.parametrize("check", ["ping", "{type: exec, command: [/bin/true]}"])
def test_a_service_on_all_ports_may_have_a_check_that_needs_none(check: str) -> None:
    assert only(service(f"check: {check}", listen="203.0.113.10:0")).check.port is None


def test_checks_through_the_service_are_of_its_port_and_family() -> None:
    check = "check: {type: tcp, via: vip, port: 81}"
    assert mistakes(service(f"forward: dsr\n{check}")) == [
        "FILE:6: services[0].check: via: vip checks the service's own port; leave out port"
    ]
    assert only(service(f"forward: nat\n{check}")).check.port == 81
    assert mistakes(service("forward: ipip\ncheck: {via: vip}", "[{address: 'fd00::1'}]")) == [
        "FILE:6: services[0].check: via: vip needs backends of the service's own family, IPv4"
    ]
