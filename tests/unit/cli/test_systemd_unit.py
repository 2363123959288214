"""The unit that the documentation shows: a cause that lasts a while does not mean failed for good."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

OPERATION = Path(__file__).parents[3] / "docs" / "operation.md"


@pytest.fixture
def unit() -> str:
    shown = re.search(r"```ini\n(.*?)```", OPERATION.read_text(), re.DOTALL)
    assert shown is not None
    return shown[1]


def test_it_is_started_again_for_as_long_as_it_takes(unit: str) -> None:
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(unit)
    assert parsed["Unit"]["StartLimitIntervalSec"] == "0", "in this section, or it is not heard"
    service = parsed["Service"]
    assert service["Restart"] == "on-failure" and int(service["RestartSec"].removesuffix("s")) >= 1
    assert service["Type"] == "notify" and service["ExecReload"] == "/bin/kill -HUP $MAINPID"


def test_systemd_understands_it(unit: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / "xdplb.service"
    path.write_text(unit.replace("/opt/xdplb/.venv/bin/xdplb", "/bin/true"))
    said = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=30)
    assert "xdplb.service" not in said.stderr, said.stderr
