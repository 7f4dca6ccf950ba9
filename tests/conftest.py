"""Fixtures and options: libraries as parameters, and skips that cannot hide."""

from __future__ import annotations

import pytest
from libraries import LIBRARIES, parameter


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
    """Run a test that takes ``xp`` over every library, and over each floating dtype it has if the
    test takes ``dtype``; with ``pytest.mark.libraries("strided")`` only over those that are so."""
    if "xp" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("libraries")
    wanted = marker.args if marker else ()
    chosen = [one for one in LIBRARIES.values() if all(getattr(one, kind) for kind in wanted)]
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
