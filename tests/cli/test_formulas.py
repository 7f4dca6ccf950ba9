"""``relu-xp formulas``: what is found to be wrong, how it is timed, and what is printed."""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

import relu_xp
from relu_xp import plotting, relu
from relu_xp.cli import _findings, _shared, formulas, main
from relu_xp.cli._findings import FORMULAS, Formula, where_wrong

MAXIMUM, BY_MASK, BY_ABS, ABS_BY_MASK, IN_PLACE, INDEXED, SLOPES, TEXTBOOK, OURS = FORMULAS
LARGEST = {"float16": "6.6e+04", "bfloat16": "3.4e+38", "float32": "3.4e+38", "float64": "1.8e+308"}


def library(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries being imported
        return _shared.choose_library(name)


# ---- where it is wrong


@pytest.mark.parametrize("dtype", LARGEST)
def test_numpy_by_hand(dtype):
    """Every entry was found with NumPy alone, but one that depends on NumPy's vector loops."""
    scalar = "0-d gives a scalar"
    zeros = np.full(153, -0.0, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    kept = ["-0.0 at -0.0"] * bool(np.signbit(np.maximum(zeros, 0).astype(float)).any())
    integers = ["int32 becomes float64", "-1 at 2147483647 (int32)"]
    expected = {
        MAXIMUM: [*kept, scalar],
        BY_MASK: ["NaN at -inf", "-0.0 at -1, -0.0", scalar],
        BY_ABS: ["NaN at -inf", f"inf at {LARGEST[dtype]}", scalar, *integers],
        ABS_BY_MASK: ["NaN at -inf", scalar],
        IN_PLACE: [*kept, "writes x"],
        INDEXED: ["-0.0 at -0.0", "writes x"],
        SLOPES: ["NaN at -inf, inf", "-0.0 at -1, -0.0", scalar],
        TEXTBOOK: [],
        OURS: [],
    }
    found = {formula: where_wrong(formula, np, dtype) for formula in FORMULAS}
    assert found == expected


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda xp, x: relu(x).astype("f8"), "float32 becomes float64"),
        (lambda xp, x: relu(x)[:], "0-d: IndexError: too many indices"),
        (lambda xp, x: getattr(xp, "a\nb " * 50), "cannot run: AttributeError: mod"),
    ],
)
def test_further_findings(run, text):
    found = where_wrong(Formula("", "test", run), np, "float32")
    assert [one.startswith(text) for one in found].count(True) == 1, found
    assert max(map(len, found)) < 90


def test_dtypes_are_those_of_the_library(require, monkeypatch):
    require("array_api_strict")
    with pytest.raises(ValueError, match="^array_api_strict has no float16 here$"):
        formulas.choose_dtype(library("array_api_strict"), "float16")
    for dtype in LARGEST:
        assert formulas.choose_dtype(library("numpy"), dtype) == dtype
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ValueError, match="no bfloat16 here: pip install ml-dtypes$"):
        formulas.choose_dtype(library("numpy"), "bfloat16")


# ---- how long it takes


def test_formulas_take_turns_and_one_that_writes_gets_a_fresh_copy(monkeypatch):
    calls = []

    def formula(name, run):
        def recorded(xp, x):
            if x.shape == (30, 40):
                assert -0.5 <= x.min() < -0.45 < 0.45 < x.max() <= 0.5
                calls.append(name)
            return run(xp, x)

        return Formula(name, "test", recorded)

    broken = formula("broken", lambda xp, x: xp.nothing)
    three = (formula("writes", INDEXED.run), formula("reads", BY_ABS.run), broken)
    monkeypatch.setattr(_findings, "FORMULAS", (*three, formula("ours", OURS.run)))
    monkeypatch.setattr(formulas.time, "perf_counter", lambda: float(len(calls)))
    rows = formulas.measure(library("numpy"), (30, 40), "float32", 2, 0)
    order = ["writes", "reads", "ours"]
    assert calls == [*order, *reversed(order), *order]
    assert [row["seconds"] for row in rows] == [[1, 1], [1, 1], [], [1, 1]]
    assert [row["median_s"] for row in rows] == [1, 1, None, 1]
    assert [row["times_ours"] for row in rows] == [1, 1, None, 1]


@pytest.mark.parametrize("error", [MemoryError("12 GiB"), RuntimeError("12 GiB")])
def test_an_array_that_does_not_fit_is_one_line(monkeypatch, capsys, error):
    def fail(xp, x):
        if x.shape == (30,):
            raise error
        return relu(x)

    monkeypatch.setattr(_findings, "FORMULAS", (Formula("", "test", fail),))
    with pytest.raises(SystemExit, match="2"):
        main(["formulas", "--backend", "numpy", "--shape", "30"])
    line = capsys.readouterr().err.splitlines()[-1]
    reason = f"{type(error).__name__}: 12 GiB"
    assert line == f"relu-xp formulas: error: cannot time 30 of float64: {reason}"


# ---- the command


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["array_api_strict", "dask", "jax", "torch"])
def test_other_libraries_in_a_file(require, capsys, tmp_path, backend):
    """What holds for each in any version: which are right, which write x, which cannot run."""
    require(backend), require("tqdm")
    file = tmp_path / "times.json"
    dtype = "float32" if backend == "jax" else "float64"  # JAX has float64 by a setting only
    command = ["formulas", "--backend", backend, "--shape", "20x30", "--repeats", "2"]
    command += ["--dtype", dtype]
    assert main([*command, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.replace(str(file), "").splitlines())) < 80
    assert "      1.00  relu_xp.relu(x)" in out
    assert re.search(r"100%.* ([0-9]+)/\1 ", err), "no progress bar, or one that does not end"

    record = json.loads(file.read_text())
    settings = [record[key] for key in ("backend", "shape", "dtype", "seed")]
    assert settings == [backend, [20, 30], dtype, 0]
    assert record["date"].endswith("+00:00")
    assert record["machine"]["cpus"] >= 1
    assert record["versions"]["relu_xp"] == relu_xp.__version__
    found = {}
    for row, formula in zip(record["formulas"], FORMULAS, strict=True):
        assert (row["formula"], row["origin"]) == (formula.text, formula.origin)
        found[formula] = "; ".join(row["findings"])
        runs = "cannot run" not in found[formula]
        assert len(row["seconds"]) == 2 * runs
        assert (row["median_s"] is not None) is runs
    if backend == "jax":  # XLA flushes subnormals on a CPU, those of relu too
        assert found[OURS] in ("", "0 at 1.4e-45")
        for formula in (IN_PLACE, INDEXED, TEXTBOOK):
            assert found[formula].startswith("cannot run")
    else:
        assert found[OURS] == found[TEXTBOOK] == ""
        assert found[INDEXED] == "-0.0 at -0.0; writes x"
    assert found[BY_MASK].startswith("cannot run") is (backend == "array_api_strict")
    assert "inf at" in found[BY_ABS]
    assert "int32" in found[BY_ABS]


def test_what_is_printed(quick, capsys):
    command = ["--backend", "numpy", "--shape", "20x30", "--repeats", "3", "--seed", "4"]
    assert main(["formulas", *command]) == 0
    assert quick == [(library("numpy"), (20, 30), "float64", 3, 4)]
    assert capsys.readouterr().out.splitlines() == [
        "backend             numpy",
        "device              cpu",
        "array               20x30, float64",
        "",
        "      ms    x ours  formula",
        "                    where it is wrong",
        "",
        "     125      2.00  x * (x > 0)",
        "                    NaN at -inf; writes x",
        "       -         -  x[x < 0] = 0",
        "                    cannot run: TypeError: no",
        "    62.5      1.00  relu_xp.relu(x)",
        "                    right",
    ]


def test_a_narrow_window_without_tqdm(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["formulas", "--backend", "numpy", "--shape", "9", "--repeats", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) < 40
    assert "int32 becomes float64; -1 at 2147483647 (int32)" in " ".join(out.split())


def test_nothing_in_the_picture_overlaps(require, rows):
    """However many findings there are."""
    require("matplotlib")
    rows = [{**rows[k % 3], "findings": [f"{-n} at {n}" for n in range(5 * k)]} for k in range(9)]
    figure = plotting.formulas_chart(rows, "numpy, 5000x5000, float64")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= axes.bbox.x0
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
