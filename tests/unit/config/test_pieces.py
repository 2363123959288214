"""A file that is read again: only what changed is read anew, and the result is that of reading all of it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_config_generated import VALID

from xdplb.config import read as configuration
from xdplb.config.pieces import Pieces
from xdplb.errors import ConfigError
from xdplb.model import Config


def file(count: int, more: str = "", *, first: int = 0) -> str:
    services = "".join(
        f"- name: s{n}\n  listen: 198.18.0.{n + 1}:80\n  backends:\n"
        f"  - {{name: a, address: 10.0.{n}.1}}  # one\n  - {{name: b, address: 10.0.{n}.2, weight: 2}}\n"
        for n in range(first, first + count)
    )
    return f"defaults: {{forward: dsr}}\nservices:\n{services}{more}"


def whole(text: str) -> Config | None:
    """Read at once."""
    try:
        return configuration.parse_whole(text, "FILE")
    except ConfigError:
        return None


def test_a_service_whose_text_stays_is_not_read_again_and_is_the_same_object() -> None:
    pieces = Pieces()
    before = pieces.parse(file(20))
    after = pieces.parse(file(20).replace("10.0.7.2, weight: 2", "10.0.7.2, weight: 3"))
    assert before is not None and after is not None and pieces.read == 21
    assert [n for n in range(20) if before.services[n] is not after.services[n]] == [7]
    assert after.services[7].backends[1].weight == 3


def test_services_may_come_go_and_change_places() -> None:
    pieces = Pieces()
    for text in (file(3), file(5), file(4, first=1), file(1), file(2)):
        assert pieces.parse(text) == whole(text)
    assert pieces.read == 3 + 2 + 0 + 1 + 1


@pytest.mark.parametrize(
    "changed",
    [
        lambda text: text.replace("forward: dsr", "forward: nat"),
        lambda text: text.replace("defaults:", "flow_cache: {capacity: 4096}\ndefaults:"),
        lambda text: text + "interfaces: [eth0]\n",
        lambda text: "# a comment\n" + text,
    ],
)
def test_what_stands_beside_the_services_may_concern_all_of_them(changed: Callable[[str], str]) -> None:
    pieces = Pieces()
    pieces.parse(file(3))
    assert pieces.parse(changed(file(3))) == whole(changed(file(3)))
    assert pieces.read == 6


@pytest.mark.parametrize(
    "text",
    [
        file(2, "- {name: s0, listen: '198.18.9.9:80', backends: [{address: 10.9.0.1}]}\n"),
        file(2, "- {name: s9, listen: '198.18.0.1:80', backends: [{address: 10.9.0.1}]}\n"),
        file(2, "- {name: s9, listen: '198.18.9.9:80', backends: [{address: 198.18.0.2}]}\n"),
        file(2, "- {name: s9, listen: '10.0.1.2:80', backends: [{address: 10.9.0.1}]}\n"),
        file(2, "- {name: s9, listen: '198.18.9.9:80', backends: [{address: 10.9.0.1, wieght: 1}]}\n"),
        file(2, "- {name: s9, listen: '198.18.9.9:80', backends: []}\n"),
        file(2, "source_pool: [10.0.1.1]\n"),
        file(2, "source_pool: [198.18.0.1]\n"),
        file(2, "---\n"),
        file(2, "- !!set {a, b}\n"),
        file(2, "- \n"),
        file(2, "services: []\n"),
        file(2).replace("services:", "services: &all"),
        "",
        "services:\n",
        "services: []\n",
        "services:\n  web: {}\n",
        "- services:\n- a\n",
        "services: 'a\nservices:\n- b'\n",
    ],
)
def test_a_mistake_is_left_to_who_reads_the_whole(text: str) -> None:
    pieces = Pieces()
    pieces.parse(file(2))
    assert pieces.parse(text) is None


ONE_MORE = "listen: '198.18.9.9:80', backends: [{address: 10.9.0.1}]"


@pytest.mark.parametrize(
    "text",
    [
        file(2).replace("name: s1", "name: 's1'\n\n  # - name: not one"),
        file(2).replace("- name", "-\n  name"),
        file(2).replace("\n", "\r\n"),
        file(2, f'- {{name: s9, check: {{type: udp, send: "a\n- name: b"}}, {ONE_MORE}}}\n'),
        file(1, f"- &a {{name: s9, {ONE_MORE}}}\n- {{<<: *a, name: s8, listen: '198.18.9.8:80'}}\n"),
        f"defaults: &d {{forward: dsr}}\nservices:\n- {{<<: *d, name: s8, {ONE_MORE}}}\n",
        "---\n" + file(2),
        "services:\n\n# first\n\n  " + file(2).partition("services:\n")[2].replace("\n", "\n  ") + "\n",
        "services: # all of them\n" + file(2).partition("services:\n")[2] + "...\n",
        file(2).replace("198.18.0.1:80", "|-\n   198.18.0.1:80"),
    ],
)
def test_texts_of_all_kinds_mean_what_they_mean_as_a_whole(text: str) -> None:
    pieces = Pieces()
    pieces.parse(file(2))
    assert whole(text) is not None
    assert pieces.parse(text) in (None, whole(text))
    assert configuration.parse(text, "FILE") == whole(text)


@given(st.lists(st.lists(st.sampled_from(VALID), unique_by=id), min_size=2, max_size=4), st.booleans(), st.booleans())
def test_whatever_was_read_before_the_result_is_the_same(
    stories: list[list[dict[str, object]]], flow: bool, indented: bool
) -> None:
    pieces = Pieces()
    for services in stories:
        text = yaml.safe_dump({"services": services}, default_flow_style=flow, sort_keys=False)
        if indented and not flow:
            text = text.replace("\n", "\n  ").rstrip(" ")
        assert pieces.parse(text) in (None, whole(text))


def test_a_file_of_authorities_is_read_each_time(tmp_path: Path) -> None:
    authorities = tmp_path / "ca.pem"
    check = f"check: {{type: https, tls: {{verify: true, ca: {authorities}}}}}"
    texts = [file(1).replace("backends:", f"{check}\n  backends:"), file(1).replace("dsr", f"dsr, {check}")]
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=ca -keyout /dev/null"
    for text in texts:
        pieces = Pieces()
        for _ in range(2):
            subprocess.run([*command.split(), "-out", str(authorities)], check=True, capture_output=True)
            config = pieces.parse(text)
            assert config is not None
            assert config.services[0].check.tls.authorities == authorities.read_text(encoding="ascii")
