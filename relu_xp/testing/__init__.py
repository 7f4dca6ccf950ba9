"""For the tests of code that uses relu_xp: a pytest plugin, and a gradient check.

``pytest_plugins = ["relu_xp.testing"]`` in a ``conftest.py`` gives

- the fixture ``xp``: the array API namespace of one library after the other. A library that is not
  installed, or has no device, is a skip with its reason;
- ``--xp numpy,cupy``: only these, any library by its name. One that cannot be had is a failure;
- ``--require-gpu``: CuPy that cannot be had is a failure.

`relu_xp.testing.conformance` is the suite that a backend has to pass, to be run over any library.
Nothing here but that suite needs pytest. (PYTEST_DONT_REWRITE: there is no assert to rewrite, and a
conftest may import this module before pytest does.)
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from relu_xp import dispatch
from relu_xp.testing.gradients import check_gradient

if TYPE_CHECKING:
    import pytest

__all__ = ["check_gradient"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--xp`` and ``--require-gpu``."""
    group = parser.getgroup("relu_xp")
    group.addoption(
        "--xp",
        metavar="NAMES",
        type=_names,
        help="array libraries for the fixture xp, for example numpy,cupy; each must be there "
        "(default: those that are installed)",
    )
    group.addoption(
        "--require-gpu", action="store_true", help="fail, instead of skip, without a CUDA device"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Add the fixture ``xp`` over the libraries that the options name."""
    import pytest

    asked: list[str] | None = config.getoption("--xp")
    gpu: bool = config.getoption("--require-gpu")
    if gpu and asked is not None and "cupy" not in asked:
        raise pytest.UsageError("--require-gpu needs cupy among the libraries of --xp")

    class Fixtures:
        @pytest.fixture(params=asked or dispatch.LIBRARIES)
        def xp(self, request: pytest.FixtureRequest) -> Any:
            """Array API namespace of one library after the other (``--xp``)."""
            name = request.param
            try:
                return dispatch.namespace(name)
            except dispatch.LibraryError as error:
                reason = f"{name} is {error.reason}"
            if asked is not None or (gpu and name == "cupy"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)

    # A plugin made now, because pytest asks a fixture for its parameters before any test.
    config.pluginmanager.register(Fixtures(), "relu_xp.testing.xp")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which module serves each library of ``--xp``."""
    names: list[str] | None = config.getoption("--xp")
    if names is None:
        return None
    return "relu_xp: " + ", ".join(f"{name} by {dispatch.module_of(name)}" for name in names)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} has an empty name, or one twice; give names, for example numpy,cupy"
        )
    return names
