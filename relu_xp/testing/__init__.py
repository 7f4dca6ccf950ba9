"""For the tests of code that uses relu_xp: a pytest plugin, and `check_gradient`.

``pytest_plugins = ["relu_xp.testing"]`` in a ``conftest.py`` adds two options and the fixture
``xp``; see the README.md of this folder. `relu_xp.testing.conformance` is the suite that every
backend has to pass. Nothing but that suite needs pytest. (PYTEST_DONT_REWRITE: there is no assert
here, and a conftest may import this module before pytest does.)
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
        help="array libraries for the fixture xp, for example numpy,cupy; a missing one is a "
        "failure (default: those that are installed)",
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

    # A plugin made now: pytest reads the parameters of a fixture before it runs any test.
    config.pluginmanager.register(Fixtures(), "relu_xp.testing.xp")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Return the class that serves each library of ``--xp``."""
    names = [name for name in config.getoption("--xp") or () if dispatch.availability(name) is None]
    classes = [dispatch.backend_class(name) for name in names]
    return [
        f"relu_xp: {name} by {kind.__module__}.{kind.__qualname__}"
        for name, kind in zip(names, classes, strict=True)
    ]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} has an empty name, or one twice; give names, for example numpy,cupy"
        )
    return names
