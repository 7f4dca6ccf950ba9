"""Fixtures and options: libraries as parameters, and skips that cannot hide."""

from __future__ import annotations

import contextlib
import ctypes
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
from libraries import LIBRARIES, parameter

pytest_plugins = ["relu_xp.testing"]  # --require-gpu; `xp` below takes the place of its own


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
    group.addoption(
        "--ran", metavar="FILE", help="write what ran over which library (tests/support.py)"
    )


def pytest_configure(config):
    if config.getoption("--ran"):
        config.pluginmanager.register(support.Ran(config.getoption("--ran")))


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.user_properties += support.properties_of(item)
        if (
            "float16" in item.name
        ):  # where the oracle goes through every pattern, four times as long
            item.add_marker("no_cover")
    if "exhaustive" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


def unavailable(config, reason, gpu=False):
    """Skip a test for a visible reason, or fail it where the options ask for that."""
    if config.getoption("--require-gpu" if gpu else "--no-skip"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def require(request):
    """Return a function that imports a module, or skips (or fails) the test."""
    import importlib

    def load(module):
        try:
            return importlib.import_module(module)
        except ImportError as error:
            return unavailable(request.config, f"{module} is not installed: {error}")

    return load


@pytest.fixture
def native(request):
    """The compiled kernels: a test that takes this needs them."""
    if reason := LIBRARIES["native"].load():
        unavailable(request.config, reason)
    from relu_xp.kernels import cpu

    return cpu


def pytest_generate_tests(metafunc):
    """Run a test that takes ``xp`` over every library, and over each floating dtype it has if the
    test takes ``dtype``; with ``pytest.mark.libraries("strided")`` only over those that are so."""
    if "xp" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("libraries")
    wanted = marker.args if marker else ()
    names = metafunc.config.getoption("--xp") or LIBRARIES
    if unknown := set(names) - set(LIBRARIES):
        raise pytest.UsageError(f"--xp: {unknown} not among {', '.join(LIBRARIES)}")
    chosen = [LIBRARIES[name] for name in names]
    chosen = [one for one in chosen if all(getattr(one, kind) for kind in wanted)]
    if "dtype" in metafunc.fixturenames:
        pairs = [parameter(one, dtype) for one in chosen for dtype in one.dtypes]
        metafunc.parametrize(("xp", "dtype"), pairs, indirect=["xp"])
    else:
        metafunc.parametrize("xp", [parameter(one) for one in chosen], indirect=True)


@pytest.fixture
def xp(request):
    """A library, as libraries.py wraps it."""
    library = request.param
    reason = library.load()
    if reason:
        unavailable(request.config, reason, gpu=library.gpu)
    with library.running():
        yield library


@pytest.fixture
def refused(capsys):
    """Return a function that runs a bad request and returns the one line about it."""

    from relu_xp.__main__ import main

    def check(*arguments, program="relu-xp train"):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2
        assert out == ""
        assert err.endswith("\n")
        assert len(err.splitlines()) == 1
        start = f"{program}: error: "
        assert err.startswith(start)
        return err.removeprefix(start).rstrip("\n")

    return check


@pytest.fixture
def library(xp):
    """The same, under the name that the conformance suite gives it."""
    return xp


@pytest.fixture(scope="session")
def flush_to_zero(request, tmp_path_factory):
    """A context manager in which this thread's processor takes subnormals for zero."""
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
def python(tmp_path):
    """Return a function that runs a script in a fresh interpreter, where a warning is an error.

    It returns what the script printed, once the script has ended with the status expected, in time,
    and with nothing on stderr, or what is expected there. A crash is a negative status. A variable
    of None is one that the environment has not.
    """
    numbers = itertools.count()

    def run(script, *arguments, status=0, stderr="", timeout=60, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RELU_XP_")}
        for name, value in variables.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = str(value)
        file = tmp_path / f"script{next(numbers)}.py"
        file.write_text(textwrap.dedent(script))
        process = subprocess.Popen(
            [sys.executable, "-W", "error", file, *map(str, arguments)],
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
