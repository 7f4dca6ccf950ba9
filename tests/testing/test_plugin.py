"""relu_xp.testing in a project of its users', and for another package's backend."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from libraries import installed, unavailable

import relu_xp
from relu_xp import dispatch
from relu_xp.testing import _names

PLUGIN = Path(__file__).parents[1] / "plugin"
SUITE = ("-p", "relu_xp.testing", "--pyargs", "relu_xp.testing.conformance")


def run_pytest(folder, *arguments, path=(), status=0):
    """Run pytest in a folder as in a project of its own; return what it printed."""
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider -W error\n")
    here = Path(relu_xp.__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    before = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(here), *before])
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    """A user's project: a conftest, and a test that names no library."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["relu_xp.testing"]\n')
    (tmp_path / "test_it.py").write_text(
        "import relu_xp\n"
        "from relu_xp.testing import check_gradient\n\n\n"
        "def test_network(xp):\n"
        "    check_gradient(relu_xp.LeakyReLU(0.5), xp.asarray([-1.0, 0.0, 2.0]))\n"
    )
    return tmp_path


def test_names_of_libraries_are_separated_by_commas():
    assert _names("numpy") == ["numpy"]
    assert _names("numpy, cupy") == ["numpy", "cupy"]
    for text in ("", "numpy,", "numpy,,cupy", "numpy,numpy"):
        with pytest.raises(argparse.ArgumentTypeError, match="has an empty name, or one twice"):
            _names(text)


@pytest.mark.slow  # imports every library
def test_a_project_of_a_user(project):
    printed = run_pytest(project, "-v", "-rs", "-W", "ignore")
    assert "test_network[numpy] PASSED" in printed
    for name in dispatch.LIBRARIES:
        reason = dispatch.availability(name)
        assert f"test_network[{name}] {'PASSED' if reason is None else 'SKIPPED'}" in printed
        assert reason is None or f"{name} is {reason[:40]}" in printed


def test_libraries_that_are_named_must_be_there(project):
    printed = run_pytest(project, "--xp", "numpy,nothing_of_the_kind", status=1)
    assert "relu_xp: numpy by relu_xp.backends." in printed
    assert "1 passed, 1 error" in printed
    assert "nothing_of_the_kind is not installed" in printed
    assert "--xp" in run_pytest(project, "--xp", "numpy,numpy", status=4)


def test_a_gpu_that_is_required_and_absent_is_a_failure(project):
    if dispatch.availability("cupy") is None:
        pytest.skip("there is a CUDA device")
    printed = run_pytest(project, "-k", "numpy or cupy", "--require-gpu", status=1)
    assert "1 passed, " in printed
    assert "1 error" in printed
    assert "cupy is not " in printed
    printed = run_pytest(project, "--xp", "numpy", "--require-gpu", status=4)
    assert "--require-gpu needs cupy among the libraries of --xp" in printed


def test_a_project_may_have_an_xp_of_its_own(project):
    with (project / "conftest.py").open("a") as file:
        file.write("\n\nimport pytest\n\n\n@pytest.fixture(params=['mine'])\ndef xp():\n")
        file.write("    import numpy\n    return numpy\n")
    assert "test_network[mine] PASSED" in run_pytest(project, "-v")


@pytest.mark.slow  # installs a package
def test_a_backend_of_another_package_passes(request, tmp_path):
    for module in ("array_api_strict", "pip"):
        if not installed(module):
            unavailable(request.config, f"{module} is not installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path, PLUGIN]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "hatchling" in done.stderr:
        unavailable(request.config, f"pip cannot get hatchling: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    printed = run_pytest(tmp_path, *SUITE, "--xp", "array_api_strict", path=[tmp_path])
    assert "relu_xp: array_api_strict by relu_xp_strict." in printed
    assert " passed, " in printed
    assert "failed" not in printed


def test_neither_pytest_nor_ml_dtypes_is_needed(python):
    printed = python("""
        import sys
        sys.modules["pytest"] = sys.modules["ml_dtypes"] = None
        import numpy, relu_xp
        from relu_xp.testing import check_gradient, reference

        check_gradient(relu_xp.ReLU(), numpy.ones(3))
        print(*reference.DTYPES)
        try:
            import relu_xp.testing.conformance
        except ModuleNotFoundError as error:
            print(error)
    """)
    assert printed.splitlines() == [
        "float16 float32 float64",
        "relu_xp.testing.conformance needs pytest: pip install pytest",
    ]
