"""What people write for ReLU: what is found to be wrong with it, and how it is timed and shown."""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import relu_xp
from relu_xp import formulas, training
from relu_xp.__main__ import main
from relu_xp.formulas import FORMULAS, Finding, Formula, Measured, Row

MAXIMUM, BY_MASK, BY_ABS, ABS_BY_MASK, IN_PLACE, INDEXED, NUMBERS, TEXTBOOK, OURS = FORMULAS
OTHERS = ("array_api_strict", "dask", "jax", "torch")
LARGEST = {"float16": "6.6e+04", "bfloat16": "3.4e+38", "float32": "3.4e+38", "float64": "1.8e+308"}


@pytest.fixture(autouse=True)
def window(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def setting(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries being imported
        return training.choose(backend)


def texts(formula, xp, dtype):
    return [finding.text for finding in formulas.where_wrong(formula, xp, dtype)]


# ---- where it is wrong


@pytest.mark.parametrize("dtype", LARGEST)
def test_numpy_by_hand(dtype):
    """Every entry was seen to be so with NumPy alone, but one that is NumPy's accident."""
    scalar = "0-d gives a scalar"
    zeros = np.full(153, -0.0, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    kept = ["-0.0 at -0.0"] * bool(np.signbit(np.maximum(zeros, 0).astype(float)).any())
    expected = {
        MAXIMUM: [*kept, scalar],
        BY_MASK: ["NaN at -inf", "-0.0 at -1, -0.0", scalar],
        BY_ABS: [
            "NaN at -inf",
            f"inf at {LARGEST[dtype]}",
            scalar,
            "int32 becomes float64",
            "-1 at 2147483647 (int32)",
        ],
        ABS_BY_MASK: ["NaN at -inf", scalar],
        IN_PLACE: [*kept, "writes x"],
        INDEXED: ["-0.0 at -0.0", "writes x"],
        NUMBERS: ["NaN at -inf, inf", "-0.0 at -1, -0.0", scalar],
        TEXTBOOK: [],
        OURS: [],
    }
    found = {formula: texts(formula, setting("numpy").namespace, dtype) for formula in FORMULAS}
    assert found == expected


@pytest.mark.filterwarnings("ignore:Passing more than 2 positional arguments:DeprecationWarning")
def test_the_text_is_what_runs():
    x = np.array([-np.inf, -1.0, -0.0, 0.0, 5e-324, 1.0, 1.7e308, np.inf, np.nan])
    for formula in FORMULAS:
        names = {"np": np, "relu_xp": relu_xp, "x": x.copy(), "t0": 0, "a0": 0, "a1": 1}
        *statements, last = formula.text.split("; ")
        with np.errstate(all="ignore"):
            exec("\n".join(statements), names)
            if " = " in last:
                exec(last, names)
                by_text = names.get("out", names["x"])
            else:
                by_text = eval(last, names)
            by_function = formula.run(np, x.copy())
        assert by_text.tobytes() == by_function.tobytes(), formula.text


def flushed(xp, x):
    return np.where(x < 1e-30, 0, x).astype(x.dtype) if x.dtype.kind == "f" else relu_xp.relu(x)


def overwritten(xp, x):
    y = relu_xp.relu(x)
    x[...] = 7
    return y


def floats_only(xp, x):
    if x.dtype.kind != "f":
        raise ValueError("no\n integers")
    return relu_xp.relu(x)


def one_axis(xp, x):
    (_,) = x.shape
    return relu_xp.relu(x)


@pytest.mark.parametrize(
    ("run", "findings"),
    [
        (lambda xp, x: xp.where(x > 0, x, 0 * x.dtype.type()), {"NaN lost": "0 at NaN"}),
        (lambda xp, x: xp.where(x == -1, xp.nan, relu_xp.relu(x)), {"NaN made": "NaN at -1"}),
        (lambda xp, x: xp.where(x <= 0, -0.0, x), {"-0.0": "-0.0 at -inf, -1, -0.0, 0"}),
        (lambda xp, x: relu_xp.relu(x) * x.dtype.type(2) / 2, {"overflow": "inf at 3.4e+38"}),
        (flushed, {"subnormal": "0 at 1.4e-45"}),
        (lambda xp, x: relu_xp.relu(x, max_value=1), {"value": "1 at 3.4e+38, inf"}),
        (lambda xp, x: relu_xp.relu(x).astype("f8"), {"dtype": "float32 becomes float64"}),
        (overwritten, {"writes x": "writes x"}),
        (lambda xp, x: relu_xp.relu(x)[()], {"0-d": "0-d gives a scalar"}),
        (one_axis, {"0-d": "0-d: ValueError: not enough values to unpack (expected 1, got 0)"}),
        (floats_only, {"integers": "int32: ValueError: no integers"}),
        (lambda xp, x: xp.nothing, {"cannot run": "cannot run: AttributeError: module"}),
    ],
)
def test_each_kind_of_finding(run, findings):
    """None is there for nothing: here each occurs, and where it is right nothing else does."""
    found = formulas.where_wrong(Formula("", "test", run), setting("numpy").namespace, "float32")
    for kind, text in findings.items():
        assert [one.text.startswith(text) for one in found if one.kind == kind] == [True], found
    allowed = {"0-d", "integers", *findings}  # a NumPy expression gives scalars, say
    assert {one.kind for one in found} <= allowed, found


def test_an_error_is_short():
    def fail(xp, x):
        raise RuntimeError("many\nwords " * 50)

    (finding,) = formulas.where_wrong(Formula("", "test", fail), np, "float64")
    assert len(finding.text) < 90
    assert finding.text.startswith("cannot run: RuntimeError: many words")
    assert finding.text.endswith(" ...")


@pytest.mark.parametrize("backend", OTHERS)
def test_other_libraries(require, backend):
    """What holds of each whatever its version: who is right, what is written, what cannot run."""
    require(backend)
    xp = setting(backend).namespace
    with_zeros = Formula("", "test", lambda xp, x: xp.where(x <= 0, xp.zeros_like(x), x))
    found = {one: formulas.where_wrong(one, xp, "float32") for one in (*FORMULAS, with_zeros)}
    kinds = {one: {finding.kind for finding in found[one]} for one in found}
    if backend == "jax":  # XLA flushes subnormals on a CPU, ours too: README
        assert kinds[OURS] <= {"subnormal"}
        assert kinds[with_zeros] <= {"subnormal"}
        assert kinds[IN_PLACE] == kinds[INDEXED] == kinds[TEXTBOOK] == {"cannot run"}
        assert "JAX arrays are immutable" in found[INDEXED][0].text
    else:
        assert found[OURS] == found[with_zeros] == found[TEXTBOOK] == ()
        assert kinds[INDEXED] == {"-0.0", "writes x"}
        assert kinds[IN_PLACE] & {"writes x", "cannot run"}
    if backend == "array_api_strict":  # the standard multiplies no number by a bool
        assert kinds[BY_MASK] == kinds[ABS_BY_MASK] == kinds[NUMBERS] == {"cannot run"}
    else:
        assert kinds[BY_MASK] & {"NaN made", "NaN lost"}
    assert {"NaN made", "overflow", "integers"} <= kinds[BY_ABS]


def test_dtypes_are_those_of_the_library(require):
    require("array_api_strict")
    numpy, strict = setting("numpy"), setting("array_api_strict")
    for dtype in LARGEST:
        assert formulas.choose_dtype(numpy, dtype) == dtype
    assert formulas.choose_dtype(numpy) == formulas.choose_dtype(strict) == "float64"
    with pytest.raises(ValueError, match="no float16 here; there is float32, float64$"):
        formulas.choose_dtype(strict, "float16")


def test_without_ml_dtypes_there_is_no_bfloat16(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ValueError, match="numpy has no bfloat16 here; there is float16, float32"):
        formulas.choose_dtype(setting("numpy"), "bfloat16")


def test_jax_has_float64_only_where_it_was_asked_to(require):
    jax = require("jax")
    before = jax.config.jax_enable_x64
    try:
        for enabled, dtype in ((False, "float32"), (True, "float64")):
            jax.config.update("jax_enable_x64", enabled)
            assert formulas.choose_dtype(setting("jax")) == dtype
    finally:
        jax.config.update("jax_enable_x64", before)


# ---- how long it takes


def test_measure_is_interleaved_and_what_writes_gets_a_fresh_copy(monkeypatch):
    calls = []

    def formula(name, run):
        def recorded(xp, x):
            if x.shape == (30, 40):
                calls.append((name, bool((x < 0).any())))
            return run(xp, x)

        return Formula(name, "test", recorded)

    broken = formula("broken", lambda xp, x: xp.nothing)
    ours = formula("ours", OURS.run)
    mine = (formula("writes", INDEXED.run), formula("reads", BY_ABS.run), broken, ours)
    monkeypatch.setattr(formulas, "FORMULAS", mine)
    monkeypatch.setattr(formulas, "OURS", ours)
    monkeypatch.setattr(formulas, "_SHORT", 1e-9)  # one call in each timing
    measured = formulas.measure("numpy", shape=(30, 40), dtype="float32", repeats=3)
    assert [name for name, _ in calls] == [
        *("writes", "writes", "reads", "reads", "ours", "ours"),
        *("writes", "reads", "ours", "ours", "reads", "writes", "writes", "reads", "ours"),
    ]
    assert all(negatives for _, negatives in calls)
    assert [len(row.seconds) for row in measured.rows] == [3, 3, 0, 3]
    assert all(second > 0 for row in measured.rows for second in row.seconds)
    ratios = [measured.times_ours(row) for row in measured.rows]
    assert ratios[2:] == [None, 1.0]
    assert measured.rows[2].median is None
    assert ratios[0] == measured.rows[0].median / measured.rows[3].median


def test_only_the_formula_is_timed(monkeypatch):
    """By a clock that goes on by a second at every call of a formula, and by 1,000 at a copy."""
    clock = [0.0]

    def ticking(xp, x):
        clock[0] += 1
        x[...] = 0
        return x

    writes = Formula("writes", "test", ticking)
    xp = setting("numpy").namespace

    class Slow:
        def __getattr__(self, name):
            if name == "asarray":
                return self.asarray
            return getattr(xp, name)

        def asarray(self, *arguments, **keywords):
            clock[0] += 1000
            return xp.asarray(*arguments, **keywords)

    monkeypatch.setattr(formulas, "FORMULAS", (writes, OURS))
    monkeypatch.setattr(formulas.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        training, "choose", lambda backend: training.Setting("numpy", Slow(), "cpu")
    )
    measured = formulas.measure("numpy", shape=(5,), repeats=2)
    assert measured.rows[0].seconds == (1, 1)


def test_a_lazy_result_is_computed(require):
    require("dask")
    xp = setting("dask").namespace
    computed = []

    def run(chunk):
        computed.append(chunk.shape)
        return chunk

    x = xp.asarray(np.ones(8))
    lazy = x.map_blocks(run, dtype=x.dtype, meta=np.ones(0))
    assert computed == []
    formulas._settled(lazy)
    assert computed == [(8,)]


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_numbers(dtype):
    xp = setting("numpy").namespace
    x = formulas._random(xp, (100, 50), dtype, 3)
    assert x.shape == (100, 50)
    assert x.dtype.name == dtype
    values = x.astype(np.float64)
    assert -0.5 <= values.min() < -0.45 < 0.45 < values.max() <= 0.5
    np.testing.assert_array_equal(x, formulas._random(xp, (100, 50), dtype, 3))
    assert (x != formulas._random(xp, (100, 50), dtype, 4)).any()


# ---- relu-xp formulas


@pytest.fixture
def quick(monkeypatch):
    """Let the command measure at once: what is tested is what comes before and after."""
    findings = (Finding("NaN made", "NaN at -inf"), Finding("writes x", "writes x"))
    rows = (
        Row(FORMULAS[1], findings, (0.25, 0.0625, 0.125)),
        Row(FORMULAS[5], (Finding("cannot run", "cannot run: TypeError: no"),), ()),
        Row(OURS, (), (0.0625, 0.0625, 0.5)),
    )
    calls = []

    def measure(backend, **keywords):
        calls.append((backend, keywords))
        return Measured("numpy", "cpu", (20, 30), "float64", 0, rows)

    monkeypatch.setattr(formulas, "measure", measure)
    return calls


@pytest.mark.parametrize("backend", ["numpy", *OTHERS])
def test_the_command(require, capsys, tmp_path, backend):
    require(backend), require("tqdm")
    setting(backend)
    file = tmp_path / "times.json"
    command = ["formulas", "--backend", backend, "--shape", "20x30", "--dtype", "float32"]
    assert main([*command, "--repeats", "2", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^backend +" + backend, out, re.MULTILINE)
    assert "array               20x30, float32\n" in out
    for formula in FORMULAS:
        assert len(re.findall(rf"^.{{15}}  {re.escape(formula.text)}$", out, re.MULTILINE)) == 1
    assert max(map(len, out.replace(str(file), "").splitlines())) < 80
    assert "  1.00  relu_xp.relu(x)" in out
    assert re.search(r"100%.* ([0-9]+)/\1 ", err), "no progress bar, or one that does not end"

    record = json.loads(file.read_text())
    assert [record[key] for key in ("backend", "shape", "dtype", "seed")] == [
        *(backend, [20, 30], "float32", 0)
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    assert record["machine"]["cpus"] >= 1
    assert record["versions"]["relu_xp"] == relu_xp.__version__
    rows = record["formulas"]
    assert [row["formula"] for row in rows] == [formula.text for formula in FORMULAS]
    assert [row["origin"] for row in rows] == ["forum"] * 7 + ["textbook", "relu_xp"]
    for row, formula in zip(rows, FORMULAS, strict=True):
        found = formulas.where_wrong(formula, setting(backend).namespace, "float32")
        assert [(one["kind"], one["text"]) for one in row["findings"]] == [
            (one.kind, one.text) for one in found
        ]
        runs = "cannot run" not in [one.kind for one in found]
        assert len(row["seconds"]) == 2 * runs
        assert (row["median_s"] is not None) is runs
    assert rows[-1]["times_ours"] == 1


def test_what_is_printed(quick, capsys):
    command = ["--backend", "numpy", "--shape", "20x30", "--repeats", "3", "--seed", "4"]
    assert main(["formulas", *command]) == 0
    keywords = {"shape": (20, 30), "dtype": "float64", "repeats": 3, "seed": 4, "progress": True}
    assert quick == [("numpy", keywords)]
    assert capsys.readouterr().out.splitlines() == [
        "backend             numpy",
        "device              cpu",
        "array               20x30, float64",
        "",
        "     ms  x ours  formula",
        "                   where it is wrong",
        "",
        "    125    2.00  x * (x > 0)",
        "                   NaN at -inf; writes x",
        "      -       -  x[x < 0] = 0",
        "                   cannot run: TypeError: no",
        "   62.5    1.00  relu_xp.relu(x)",
        "                   right",
    ]


@pytest.mark.parametrize("columns", [40, 60])
def test_a_narrow_window(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["formulas", "--backend", "numpy", "--shape", "9", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < columns
    words = " ".join(out.split())
    for formula in FORMULAS:
        assert formula.text in words
    assert "int32 becomes float64; -1 at 2147483647 (int32)" in words


def test_without_tqdm_there_is_no_bar(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["formulas", "--backend", "numpy", "--shape", "9", "--repeats", "1"]) == 0
    out, err = capsys.readouterr()
    assert "relu_xp.relu(x)" in out
    assert err == ""


SHAPES = ["0x5", "abc", "", "5x", "-1", "5X5", "5,5", "1.5", "05", "٣"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (["--shape=" + text], f"argument --shape: {text!r} is not a shape, such as 5000x5000")
            for text in SHAPES
        ),
        (["--dtype", "int32"], "argument --dtype: invalid choice: 'int32'"),
        (["--dtype", "float16", "--backend", "array_api_strict"], "argument --dtype: array_api_st"),
        (["--repeats", "0"], "argument --repeats: '0' is not a whole number, 1 or greater"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number, 0 or greater"),
        (["--backend", "no_such"], "backend 'no_such' is not installed; there is numpy"),
        (["--json", "nowhere/t.json"], "argument --json: cannot write 'nowhere/t.json': No such"),
        (["--json", "."], "argument --json: cannot write '.': it is a directory"),
        (["--plot", "t.gif"], "argument --plot: 't.gif' must end in .png or .svg"),
        (["--plot", "nowhere/t.png"], "argument --plot: cannot write 'nowhere/t.png': No such"),
    ],
)
def test_a_bad_value_is_one_line(
    require, refused, quick, tmp_path, monkeypatch, arguments, message
):
    require("matplotlib"), require("array_api_strict")
    monkeypatch.chdir(tmp_path)
    found = refused("formulas", *arguments, program="relu-xp formulas")
    assert found.startswith(message)
    assert quick == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("9999999x9999999x9999", "9999999x9999999x9999 of float64 does not fit in memory: "),
        ("9999999x9999999x9999999", "no array can have the shape (9999999, 9999999, 9999999): "),
        ("9" * 30, f"no array can have the shape ({'9' * 30}): "),
        ("x".join("1" * 65), "no array can have the shape (1, 1, "),
    ],
)
def test_an_array_that_cannot_be_is_one_line(capsys, shape, message):
    with pytest.raises(SystemExit) as stopped:
        main(["formulas", "--backend", "numpy", "--shape", shape])
    assert stopped.value.code == 2
    err = capsys.readouterr().err.replace("\r", "\n")
    (line,) = (line for line in err.splitlines() if "error" in line)
    assert line.startswith(f"relu-xp formulas: error: {message}")
    assert "Traceback" not in err


def test_impossible_numbers_are_refused():
    for number in ({"seed": -1}, {"repeats": 0}):
        ((name, value),) = number.items()
        with pytest.raises(ValueError, match=f"^{name} must be at least .*, got {value}$"):
            formulas.measure("numpy", shape=(3,), **number)


@pytest.mark.parametrize("error", [MemoryError("12 GiB"), RuntimeError("out of Memory: 12 GiB")])
def test_a_formula_may_be_what_does_not_fit(monkeypatch, error):
    def fail(xp, x):
        if x.shape == (30,):
            raise error
        return relu_xp.relu(x)

    monkeypatch.setattr(formulas, "FORMULAS", (Formula("", "test", fail),))
    with pytest.raises(MemoryError, match="^30 of float64 does not fit in memory: .*12 GiB$"):
        formulas.measure("numpy", shape=(30,))


def test_another_error_is_not_taken_for_one_of_memory(monkeypatch):
    def fail(xp, x):
        if x.shape == (30,):
            raise RuntimeError("a bug")
        return relu_xp.relu(x)

    monkeypatch.setattr(formulas, "FORMULAS", (Formula("", "test", fail),))
    with pytest.raises(RuntimeError, match="^a bug$"):
        formulas.measure("numpy", shape=(30,))


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_disk_that_fails_leaves_the_old_file(
    require, quick, capsys, tmp_path, monkeypatch, option
):
    require("matplotlib")
    file = tmp_path / "old.png"
    file.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["formulas", "--backend", "numpy", option, str(file)])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"relu-xp formulas: error: argument {option}: cannot write ")
    assert err.endswith("No space left on device\n")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


# ---- the picture


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture(require, quick, tmp_path, capsys, suffix):
    require("matplotlib")
    files = [tmp_path / f"{number}{suffix}" for number in range(2)]
    for file in files:
        assert main(["formulas", "--backend", "numpy", "--plot", str(file)]) == 0
    assert f"figure              {files[0]}" in capsys.readouterr().out.replace("\n    ", " " * 14)
    data = files[0].read_bytes()
    assert data == files[1].read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
    else:
        text = data.decode()  # matplotlib keeps each text as a comment
        for words in ("x[x &lt; 0] = 0", "NaN at -inf; writes x", "cannot run: TypeError: no"):
            assert f"<!-- {words} -->" in text
        for words in ("125", "62.5", "ms a call, median of 3", "right", "relu_xp.relu(x)"):
            assert f"<!-- {words} -->" in text


def test_nothing_in_the_picture_overlaps(require, monkeypatch, tmp_path):
    """However much there is to say of a formula."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from relu_xp import plotting

    long = tuple(Finding("value", f"{number} at {-number}") for number in range(40))
    rows = tuple(
        Row(formula, long[: 5 * number], (0.001 * (number + 1),) * bool(number % 4))
        for number, formula in enumerate(FORMULAS)
    )
    figures = []
    monkeypatch.setattr(plotting, "_save", lambda figure, file: figures.append(figure))
    measured = Measured("numpy", "cpu", (5000, 5000), "float64", 0, rows)
    monkeypatch.setattr(Measured, "times_ours", lambda *_: 1.0)
    plotting.formulas_chart(measured, tmp_path / "x.png")
    (figure,) = figures
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    frame = figure.bbox
    boxes = [bar.get_window_extent() for bar in axes.patches]
    boxes += [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
