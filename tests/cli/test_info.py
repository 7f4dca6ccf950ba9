"""``relu-xp info``: versions, backends and devices, and why something is missing."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from types import SimpleNamespace

import pytest
from libraries import LIBRARIES

import relu_xp
from relu_xp import dispatch, kernels
from relu_xp.cli import info, main


def sections(out):
    """Return the sections by title, each with its values by label."""
    found, section = {}, {}
    for line in re.sub(r"\n {3,}", " ", out).splitlines():  # a long value continues, indented
        if line.startswith("  "):
            label, *value = re.split(r"\s{2,}", line[2:], maxsplit=1)
            section[label] = "".join(value)
        elif line:
            section = found[line] = {}
    return found


@pytest.mark.slow  # imports every library
def test_everything_is_there(capsys):
    relu_xp.show_versions()
    out = capsys.readouterr().out
    assert main(["info"]) == 0
    assert capsys.readouterr().out == out, "info prints what show_versions prints"
    assert max(map(len, out.splitlines())) < 80
    assert not re.search(" $", out, re.MULTILINE)
    assert out.isascii()
    found = sections(out)
    assert list(found) == ["Versions", "Backends", "Third-party backends", "GPU"]
    assert found["Versions"]["relu_xp"] == relu_xp.__version__
    assert found["Versions"]["numpy"] == importlib.metadata.version("numpy")
    assert list(found["Backends"]) == list(dispatch.LIBRARIES)
    if kernels.cpu:
        detail = f"{kernels.cpu.instruction_set}, {relu_xp.get_num_threads()} threads"
        name = "relu_xp.backends.compiled.CompiledBackend"
        assert found["Backends"]["numpy"] == f"{name} ({detail})"
    if LIBRARIES["cupy"].reason is None:
        assert found["Backends"]["cupy"] == "relu_xp.backends.cupy.CupyBackend"
        assert "GiB" in found["GPU"]["device 0"]
    else:
        assert found["GPU"]["none"].startswith("CuPy: not ")


def test_versions_are_those_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"cupy-cuda12x": "14.0"}.__getitem__)
    assert list(info.versions()) == ["relu_xp", "Python", "cupy-cuda12x"]
    assert info.versions()["cupy-cuda12x"] == "14.0"


@pytest.mark.parametrize(
    ("is_hip", "versions", "words"),
    [
        (False, (13010, 12090), ("CUDA 13.1", "CUDA 12.9")),
        (True, (70051831, 71252802), ("HIP 7.0", "HIP 7.12")),
    ],
    ids=["CUDA", "HIP"],
)
def test_devices(monkeypatch, is_hip, versions, words):
    properties = {"name": b"H200", "totalGlobalMem": 2**37, "major": 9, "minor": 0}
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda number: properties,
        driverGetVersion=lambda: versions[0],
        runtimeGetVersion=lambda: versions[1],
        is_hip=is_hip,
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(runtime=runtime))
    assert info.gpus() == {
        "device 0": "H200, 128.0 GiB, compute capability 9.0",
        "driver": words[0],
        "runtime": words[1],
    }


def test_no_kernels_and_a_backend_of_another_package(
    process, monkeypatch, tmp_path, without_libraries
):
    metadata = tmp_path / "fast_relu-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fast-relu\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[relu_xp.backends]\narray_api_strict = fast_relu:Strict\nnovel = fast_relu:Novel\n"
    )
    (tmp_path / "fast_relu.py").write_text(
        "from relu_xp.backends.base import Backend\nclass Strict(Backend): pass\n"
    )
    monkeypatch.setenv("RELU_XP_NATIVE", "0")
    found = sections(process("info", path=[tmp_path, without_libraries]).stdout)
    assert found["Third-party backends"] == {
        "array_api_strict": "fast_relu:Strict",
        "novel": "fast_relu:Novel",
    }
    assert found["Backends"]["array_api_strict"] in ("fast_relu.Strict", "not installed")
    reason = "switched off by RELU_XP_NATIVE=0"
    assert found["Backends"]["numpy"] == f"relu_xp.backends.numpy.NumpyBackend ({reason})"
    assert found["Backends"]["torch"] == "not installed"


def test_a_cupy_that_is_broken(process, without_libraries):
    (without_libraries / "cupy.py").write_text("import sys\nsys.exit('go away')\n")
    found = sections(process("info", path=[without_libraries]).stdout)
    assert found["Backends"]["cupy"] == "not available: go away"
    assert found["GPU"]["none"] == "CuPy: not available: go away"
    result = process("formulas", "--backend", "cupy", path=[without_libraries])
    message = "relu-xp formulas: error: backend 'cupy' is not available: go away\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)
    command = ["formulas", "--shape", "9", "--repeats", "1"]
    assert process(*command, path=[without_libraries]).returncode == 0, "by default NumPy's arrays"
