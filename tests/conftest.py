"""Fixtures and options: libraries as parameters, and skips that cannot hide."""

from __future__ import annotations

import pytest
from libraries import LIBRARIES


def pytest_addoption(parser):
    group = parser.getgroup("relu_xp")
    group.addoption(
        "--require-gpu", action="store_true", help="fail, instead of skip, without a CUDA device"
    )
    group.addoption(
        "--no-skip",
        action="store_true",
        help="fail, instead of skip, where anything but a CUDA device is absent",
    )


def unavailable(config, reason, gpu=False):
    """Skip a test for a visible reason, or fail it where the options ask for that."""
    if config.getoption("--require-gpu" if gpu else "--no-skip"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def require(request):
    """Return a function that imports a module, or skips (or fails) the test."""
    import importlib

    def load(module):
        try:
            return importlib.import_module(module)
        except ImportError as error:
            return unavailable(request.config, f"{module} is not installed: {error}")

    return load


def pytest_generate_tests(metafunc):
    """Run a test over every library, or over every floating dtype of each, by its arguments."""
    from libraries import parameter

    if "dtype" in metafunc.fixturenames and "xp" in metafunc.fixturenames:
        metafunc.parametrize(
            ("xp", "dtype"),
            [
                parameter(library.name, dtype)
                for library in LIBRARIES.values()
                for dtype in library.dtypes
            ],
            indirect=["xp"],
        )
    elif "xp" in metafunc.fixturenames:
        metafunc.parametrize("xp", [parameter(name) for name in LIBRARIES], indirect=True)


@pytest.fixture
def xp(request):
    """A library, as libraries.py wraps it."""
    library = LIBRARIES[request.param]
    reason = library.load()
    if reason:
        unavailable(request.config, reason, gpu=library.gpu)
    with library.running():
        yield library
