"""The version is written in one place, and what the project says of itself is true."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import relu_xp

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]


def test_the_version_is_written_in_one_place(python):
    version = relu_xp.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", version)
    assert PROJECT["dynamic"] == ["version"]
    assert importlib.metadata.version("relu-xp") == version
    script = "import relu_xp.__main__\nrelu_xp.__main__.main(['--version'])"
    assert python(script) == f"relu-xp {version}\n"
    files = [
        file for folder in ("relu_xp", "tests", "bench") for file in (ROOT / folder).rglob("*")
    ]
    sources = [file for file in files if file.suffix in (".py", ".toml", ".h", ".cpp", ".cuh")]
    containing = [file for file in sources if f'"{version}"' in file.read_text()]
    assert containing == [ROOT / "relu_xp/__init__.py"]


def test_changelog_and_citation_are_of_this_version():
    heads = re.findall(r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    releases = [head for head in heads if head != ("Unreleased", "")]
    assert heads[: len(heads) - len(releases)] in ([], [("Unreleased", "")])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in releases)
    lines = re.findall(r'^([\w-]+): "?(.+?)"?$', (ROOT / "CITATION.cff").read_text(), re.M)
    citation = dict(lines)
    assert releases[0] == (relu_xp.__version__, citation["date-released"])
    assert citation["version"] == relu_xp.__version__
    assert citation["license"] == PROJECT["license"]


def test_the_supported_versions_are_the_same_everywhere():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    claimed = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: 3." in c]
    assert claimed[0] == oldest
    assert sys.version_info >= tuple(map(int, oldest.split(".")))
    assert SETTINGS["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    readme, contributing = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    assert f"Python {oldest} or later" in readme
    assert f"CPython {oldest} to {claimed[-1]}" in readme
    assert f"(now {oldest} to {claimed[-1]})" in contributing
    numpy = next(one for one in PROJECT["dependencies"] if one.startswith("numpy"))
    assert f"(now from {numpy.removeprefix('numpy>=')} on)" in contributing
