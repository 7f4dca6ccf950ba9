"""What the package says of itself: its version in one place, and nothing that is not true."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import relu_xp

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_everything_that_tells_the_version_has_it_from_one_place():
    version = relu_xp.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", version)
    assert PROJECT["dynamic"] == ["version"]
    assert importlib.metadata.version("relu-xp") == version
    told = subprocess.run(
        [sys.executable, "-P", "-m", "relu_xp", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == f"relu-xp {version}\n"
    written = [
        file.relative_to(ROOT).as_posix()
        for folder in ("relu_xp", "tests", "bench")
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in (".py", ".toml", ".h", ".cpp", ".cuh")
        and f'"{version}"' in file.read_text()
    ]
    assert written == ["relu_xp/__init__.py"]


def test_the_changelog_is_of_this_version():
    """Its releases go back from this version, or there has been none; above may be what is not."""
    heads = re.findall(r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    releases = [head for head in heads if head != ("Unreleased", "")]
    assert heads[: len(heads) - len(releases)] in ([], [("Unreleased", "")])
    assert heads
    assert [name for name, _ in releases[:1]] in ([], [relu_xp.__version__])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in releases)


def test_the_oldest_python_is_the_same_everywhere():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    claimed = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: 3." in c]
    assert claimed[0] == oldest
    assert sys.version_info >= tuple(map(int, oldest.split(".")))
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert settings["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert f"Python {oldest} or later" in (ROOT / "README.md").read_text()
