"""Imports run downwards only, and `scripts/check` says no where one does not: tried by adding some to a copy."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "xdplb", tmp_path / "xdplb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(LINT, cwd=where, capture_output=True, text=True, timeout=120, check=False)


def test_the_house_as_it_stands_is_in_order(copy: Path) -> None:
    said = lint(copy)
    assert (said.returncode, "0 broken" in said.stdout) == (0, True), said.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("core/maglev", "from xdplb.daemon import engine", "Imports run downwards only"),
        ("daemon/engine", "from xdplb.api import handlers", "Imports run downwards only"),
        ("config/values", "from xdplb.net import links", "Imports run downwards only"),
        ("errors", "from xdplb import model", "Imports run downwards only"),
        (
            "core/maglev",
            "from xdplb.core import planner",
            "No two modules import each other",
        ),
        ("cli/top", "from xdplb.daemon import engine", "knows nothing of the daemon but what api says"),
        ("dataplane/codec", "import bcc", "One module imports bcc"),
        ("daemon/host", "import pyroute2", "One module imports pyroute2"),
    ],
)
def test_an_import_against_the_direction_is_refused(copy: Path, module: str, line: str, broken: str) -> None:
    with (copy / "xdplb" / f"{module}.py").open("a") as file:
        file.write(f"\n{line}  # noqa\n")
    said = lint(copy)
    assert said.returncode == 1, said.stdout
    assert [line for line in said.stdout.splitlines() if broken in line and " BROKEN" in line], said.stdout


def test_a_new_package_needs_a_floor(copy: Path) -> None:
    (copy / "xdplb" / "attic").mkdir()
    (copy / "xdplb" / "attic" / "__init__.py").write_text("")
    said = lint(copy)
    assert said.returncode == 1 and "attic" in said.stdout, said.stdout + said.stderr


def test_checks_look_at_imports_and_every_package_is_shipped() -> None:
    assert "lint-imports" in (ROOT / "scripts" / "check").read_text()
    shipped = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("xdplb/**/__init__.py")}
    assert shipped - {"xdplb.bpf"} == there
