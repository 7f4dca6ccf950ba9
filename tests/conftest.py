"""Fixtures and options: libraries as parameters, and skips that cannot stay unnoticed.

A test that takes ``xp`` runs over every library of libraries.py that is there. One that is absent
is a single skip, in test_libraries.py. A file about one library begins with
``pytest.importorskip``, a single test calls ``require``: with ``--no-skip`` all of these fail.
Tests marked ``slow`` or ``exhaustive`` run only where ``-m`` asks for them (pyproject.toml).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import support
from libraries import LIBRARIES, parameter, unavailable

pytest_plugins = ["relu_xp.testing"]  # --xp, --require-gpu; `xp` below replaces its fixture


def pytest_addoption(parser):
    group = parser.getgroup("relu_xp")
    group.addoption(
        "--no-skip",
        action="store_true",
        help="fail, instead of skip, where anything but a CUDA device is absent",
    )
    group.addoption(
        "--soak",
        type=float,
        default=2.5,
        metavar="SECONDS",
        help="how long sixteen threads call everything at once",
    )


def pytest_generate_tests(metafunc):
    """Run a test that takes ``xp`` over every library that is there, or over those of ``--xp``.

    If the test takes ``dtype`` too, over each floating dtype of each. With the marker
    ``libraries("strided")`` only over those with this attribute, with ``libraries(names=[...])``
    only over those.
    """
    if "xp" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("libraries")
    attributes = marker.args if marker else ()
    names = marker.kwargs.get("names", LIBRARIES) if marker else LIBRARIES
    asked = metafunc.config.getoption("--xp")
    if unknown := set(asked or ()) - set(LIBRARIES):
        raise pytest.UsageError(f"--xp: {unknown} not among {', '.join(LIBRARIES)}")
    gpu = metafunc.config.getoption("--require-gpu")
    chosen = [LIBRARIES[name] for name in asked or LIBRARIES if name in names]
    chosen = [one for one in chosen if all(getattr(one, name) for name in attributes)]
    chosen = [one for one in chosen if asked or one.reason is None or (gpu and one.gpu)]
    has_dtype = "dtype" in metafunc.fixturenames
    is_meant = names is not LIBRARIES or "library" in metafunc.fixturenames  # by conformance
    if not (has_dtype and is_meant):
        chosen = [one for one in chosen if not one.only_rules]
    if has_dtype:
        pairs = [parameter(one, dtype) for one in chosen for dtype in one.dtypes]
        metafunc.parametrize(("xp", "dtype"), pairs, indirect=["xp"])
    else:
        metafunc.parametrize("xp", [parameter(one) for one in chosen], indirect=True)


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.user_properties += support.properties_of(item)
        if "float16" in item.name:  # the reference goes through every pattern: 4 times slower
            item.add_marker("no_cover")
    no_gpu = LIBRARIES["cupy"].reason and not config.getoption("--require-gpu")
    without = {
        item
        for item in items
        if is_over_nothing(item) or (no_gpu and item.get_closest_marker("gpu"))
    }
    items[:] = [item for item in items if item not in without]
    config.hook.pytest_deselected(items=without)


def is_over_nothing(item):
    """Return whether no library is left for a test: pytest keeps it, as a skip."""
    return any(
        "empty parameter set" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skip")
    )


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Make a failure of a file that is skipped, under ``--no-skip``."""
    report = yield
    if report.skipped and collector.config.getoption("--no-skip"):
        report.outcome, report.longrepr = "failed", report.longrepr[2]
    return report


@pytest.fixture(scope="session")
def require(request):
    """Return a function that imports a module, or skips (or fails) the test."""

    def load(module):
        try:
            return importlib.import_module(module)
        except ImportError:
            return unavailable(request.config, f"{module.partition('.')[0]} is not installed")

    return load


@pytest.fixture
def native(request):
    """The compiled kernels: a test that takes this needs them."""
    if reason := LIBRARIES["compiled"].reason:
        unavailable(request.config, reason)
    from relu_xp.kernels import cpu

    return cpu


@pytest.fixture
def xp(request):
    """A library, as libraries.py wraps it."""
    library = request.param
    if reason := library.load():  # it was asked for by name
        pytest.fail(reason, pytrace=False)
    with library.running():
        yield library


@pytest.fixture
def library(xp):
    """The same, under the name that the conformance suite gives it."""
    return xp


@pytest.fixture(scope="session")
def flush_to_zero(request, tmp_path_factory):
    """Return a context manager in which this thread's processor flushes subnormals to zero."""
    if shutil.which("g++") is None:
        unavailable(request.config, "g++ is not installed")
    folder = tmp_path_factory.mktemp("mxcsr")
    (folder / "mxcsr.c").write_text(
        "unsigned get(void) { return __builtin_ia32_stmxcsr(); }\n"
        "void set(unsigned value) { __builtin_ia32_ldmxcsr(value); }\n"
    )
    command = ["g++", "-x", "c", "-shared", "-fPIC", "-o", folder / "mxcsr.so", folder / "mxcsr.c"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        unavailable(request.config, "not an x86 processor")
    library = ctypes.CDLL(str(folder / "mxcsr.so"))

    @contextlib.contextmanager
    def flushing():
        before = library.get()
        library.set(before | 0x8040)  # FTZ and DAZ
        try:
            yield
        finally:
            library.set(before)

    return flushing


@pytest.fixture
def without_libraries(tmp_path):
    """A folder in which the libraries that take seconds to import are not installed."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in ("cupy", "torch", "jax", "dask"):
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    return folder


@pytest.fixture
def unprivileged(request):
    """What comes before a command that may not write what its user may not: root may, else."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        unavailable(request.config, "setpriv is not installed")
    return ["setpriv", "--bounding-set", "-dac_override"]


@pytest.fixture
def python(tmp_path):
    """Return a function that runs a script in a fresh interpreter, where a warning is an error.

    That returns what the script printed, and asserts the status, an end in time and what is on
    stderr: nothing by default. A crash is a negative status. A variable of None is not set. A
    command that runs another one may come before.
    """
    numbers = itertools.count()

    def run(script, *arguments, before=(), status=0, stderr="", timeout=60, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RELU_XP_")}
        for name, value in variables.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = str(value)
        file = tmp_path / f"script{next(numbers)}.py"
        file.write_text(textwrap.dedent(script))
        process = subprocess.Popen(
            [*before, sys.executable, "-W", "error", file, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too, which hold the pipes
            printed, errors = process.communicate()
            pytest.fail(f"no end within {timeout} s\n{printed}\n{errors}")
        assert process.returncode == status, f"{printed}\n{errors}"
        assert re.fullmatch(stderr, errors, re.DOTALL), errors
        return printed

    return run
