"""The package in a frozen application, in a zip file, and where nothing may be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import relu_xp
from relu_xp import kernels

PACKAGE = Path(relu_xp.__file__).parent

# For a process to find the package on its path, also where there is an editable installation.
BY_PATH = """
import sys
from importlib.machinery import PathFinder

sys.meta_path.insert(0, PathFinder)
"""

# Prints where the package is and whether its kernels are compiled.
PROGRAM = """
import pickle
from importlib import resources

import ml_dtypes
import numpy as np

import relu_xp
from relu_xp import dispatch, kernels

relu_xp.set_num_threads(2)
for dtype in (np.dtype("float32"), np.dtype(ml_dtypes.bfloat16)):
    x = np.resize(np.array([-np.inf, -1, -0.0, 2, np.inf], dtype), 500_000)
    expected = np.where(x > 0, x, dtype.type(0))
    layer = relu_xp.ReLU()
    y, pullback = relu_xp.relu_vjp(x)
    for result in (relu_xp.relu(x), layer.forward(x), layer.backward(x), y, pullback(x)):
        assert result.dtype == dtype
        assert result.tobytes() == expected.tobytes()
x = np.array([[-1], [2]], np.float32)
layer = pickle.loads(pickle.dumps(relu_xp.PReLU(1)))
assert layer.forward(x).tolist() == [[-0.25], [2]]
assert layer.backward(x).tolist() == [[-0.25], [2]]
assert layer.grads[0].tolist() == [1]
assert dispatch.availability("numpy") is None  # by way of array_api_compat.numpy

folder = resources.files("relu_xp.kernels")  # what CuPy's kernels are compiled from
for name in ("rules.h", "cuda_kernels.cuh"):
    assert "namespace relu_xp" in folder.joinpath(name).read_text("utf-8")
print(relu_xp.__file__)
print(kernels.cpu is not None)
"""


@pytest.mark.slow
def test_a_frozen_application(require, tmp_path):
    """PyInstaller needs no option; those here leave out what it would take minutes to copy."""
    require("PyInstaller")
    (tmp_path / "app.py").write_text(PROGRAM)
    unused = ("cupy", "dask", "jax", "matplotlib", "sklearn", "torch")
    options = [f"--exclude-module={name}" for name in unused]
    subprocess.run(
        [sys.executable, "-P", "-m", "PyInstaller", "--log-level=ERROR", *options, "app.py"],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYINSTALLER_CONFIG_DIR": str(tmp_path / "cache")},
        timeout=600,
    )
    folder = tmp_path / "dist/app"
    result = subprocess.run([folder / "app"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    file, compiled = result.stdout.splitlines()
    assert Path(file).is_relative_to(folder)
    assert compiled == str(kernels.cpu is not None)


def test_a_zip_file(python, tmp_path, without_libraries):
    """Compiled kernels cannot be loaded from it."""
    file = shutil.make_archive(str(tmp_path / "packages"), "zip", PACKAGE.parent, PACKAGE.name)
    found = python(BY_PATH + PROGRAM, PYTHONPATH=file).splitlines()
    assert found == [str(Path(file, "relu_xp/__init__.py")), "False"]
    path = os.pathsep.join([file, str(without_libraries)])
    printed = python(BY_PATH + "import relu_xp\nrelu_xp.show_versions()", PYTHONPATH=path)
    assert "relu_xp.backends.numpy.NumpyBackend (not compiled" in printed


def test_an_installation_that_is_read_only(python, unprivileged, tmp_path):
    """With no compiled Python in it."""
    folder = tmp_path / "packages/relu_xp"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    files = [folder, *folder.rglob("*")]
    for file in files:
        file.chmod(0o555 if file.is_dir() else 0o444)
    write = f"open({str(folder / 'new')!r}, 'w')"
    python(write, before=unprivileged, status=1, stderr=".*Permission denied.*")
    found = python(BY_PATH + PROGRAM, before=unprivileged, PYTHONPATH=folder.parent).splitlines()
    assert found == [str(folder / "__init__.py"), str(kernels.cpu is not None)]
    assert [folder, *folder.rglob("*")] == files
