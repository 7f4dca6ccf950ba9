"""Fixtures of the command line's tests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from relu_xp.cli import formulas, main, train

ROWS = [
    {
        "formula": formula,
        "origin": origin,
        "median_s": median,
        "times_ours": times,
        "seconds": [0.25, 0.0625, 0.125],
        "findings": findings,
    }
    for formula, origin, median, times, findings in (
        ("x * (x > 0)", "forum", 0.125, 2.0, ["NaN at -inf", "writes x"]),
        ("x[x < 0] = 0", "forum", None, None, ["cannot run: TypeError: no"]),
        ("relu_xp.relu(x)", "relu_xp", 0.0625, 1.0, []),
    )
]


@pytest.fixture(autouse=True)
def window(monkeypatch):
    """A window of the usual width, whatever the one is in which the tests run."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def rows():
    """Three formulas, as `measure` returns them."""
    return ROWS


@pytest.fixture
def quick(require, monkeypatch):
    """Let training and timing return at once: tested is what comes before and after.

    The value is a list of the calls.
    """
    require("matplotlib")
    calls = []
    result = train.Result("numpy", "cpu", 5, (1.25, 0.5), (0.8, 0.975), 12345.6)
    monkeypatch.setattr(train, "train", lambda *args: calls.append(args) or result)
    monkeypatch.setattr(formulas, "measure", lambda *args: calls.append(args) or ROWS)
    return calls


@pytest.fixture
def process():
    """Return a function that runs the command line as a process, with folders of modules first.

    A command that runs another one may come before.
    """

    def run(*arguments, path=(), before=()):
        paths = [*map(str, path), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [*before, sys.executable, "-P", "-m", "relu_xp", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            timeout=300,
        )

    return run


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Return a function that runs a bad request in an empty folder and returns the one line."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit, match="^2$"):
            main(arguments)
        (line,) = capsys.readouterr().err.splitlines()
        program, _, message = line.partition(": error: ")
        assert program in ("relu-xp", f"relu-xp {arguments[0]}")
        assert sorted(tmp_path.iterdir()) == before
        return message

    return check
