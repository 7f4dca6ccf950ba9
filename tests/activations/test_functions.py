"""What holds for every function, its pullback and its layer alike."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from table import DTYPES, OTHERS, PARAMETERS, ROWS, NumPy, each_row, x_gradient

import relu_xp

X = np.linspace(-3, 3, 6, dtype=np.float32).reshape(2, 3)


NAMES = [name for name in relu_xp.__all__ if "relu" in name]


@pytest.mark.parametrize("name", NAMES)
def test_arrays_are_positional_only_and_options_keyword_only(name):
    arrays = {"relu_backward": {"dy", "x"}, "prelu": {"x", "weight"}, "bias_relu": {"x", "bias"}}
    positional = {
        "leaky_relu": {"negative_slope"},
        "clipped_relu": {"max_value"},
        "thresholded_relu": {"threshold"},
        "rrelu": {"lower", "upper"},
    }
    base = name.removesuffix("_vjp")
    options = set(ROWS[base].options if base in ROWS else PARAMETERS)
    if base == "relu6":
        options.remove("max_value")
    if name in ("relu_vjp", "bias_relu_vjp"):
        options.add("mask")
    found = {kind: set() for kind in inspect._ParameterKind}
    for parameter in inspect.signature(getattr(relu_xp, name)).parameters.values():
        found[parameter.kind].add(parameter.name)
    own = positional.get(base, set())
    assert found[inspect.Parameter.POSITIONAL_ONLY] == arrays.get(base, {"x"})
    assert found[inspect.Parameter.POSITIONAL_OR_KEYWORD] == own
    assert found[inspect.Parameter.KEYWORD_ONLY] == options - own | {"out"}


# ---- What is refused ----------------------------------------------------------------------------


def calls(row, bad, forward_only=True):
    """Return calls that are given a bad array: how the error has to begin, and the call."""
    _, pullback = row.call_vjp(NumPy, X)
    layer = row.make_layer(NumPy, 3)
    layer.forward(X)
    found = [
        (f"{row.vjp}: x", lambda: row.call_vjp(NumPy, bad)),
        ("pullback: dy", lambda: pullback(bad)),
        ("forward: x", lambda: layer.forward(bad)),
        ("backward: dy", lambda: layer.backward(bad)),
    ]
    if row.name == "relu":
        found += [
            ("relu_grad: x", lambda: relu_xp.relu_grad(bad, **row.keywords)),
            ("relu_backward: dy", lambda: relu_xp.relu_backward(bad, X, **row.keywords)),
            ("relu_backward: x", lambda: relu_xp.relu_backward(X, bad, **row.keywords)),
        ]
    if forward_only:
        found += [
            (f"{row.name}: x", lambda: row.call(NumPy, bad)),
            ("forward: x", lambda: layer.forward(bad, training=False)),
        ]
    if row.name == "prelu":
        found += [
            ("prelu: weight", lambda: relu_xp.prelu(X, bad)),
            ("prelu_vjp: weight", lambda: relu_xp.prelu_vjp(X, bad)),
        ]
    if row.name == "bias_relu":
        found += [
            ("bias_relu: bias", lambda: relu_xp.bias_relu(X, bad)),
            ("bias_relu_vjp: bias", lambda: relu_xp.bias_relu_vjp(X, bad)),
        ]
    return found


def check_refused(row, bad, match="", **options):
    for start, call in calls(row, bad, **options):
        with pytest.raises(TypeError, match=f"^{start}:? .*{match}"):
            call()


@each_row
@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ([1.0], "list"),
        (None, "NoneType"),
        (np.ma.masked_array(X), "numpy.ma"),
        (X.astype(complex), "complex128"),
        (X.astype(X.dtype.newbyteorder()), r"[<>]f4.*astype\('float32'\)"),
    ],
    ids=["list", "None", "masked array", "complex", "byte-swapped"],
)
def test_an_error_names_the_function_that_was_called(row, bad, word):
    """tests/test_validation.py has many more arrays that are refused."""
    check_refused(row, bad, word)


@each_row
def test_integers_have_no_gradient(row):
    """Whatever the parameters are; of the presets, the plain forward pass takes them."""
    integers = np.arange(-2, 4, dtype=np.int16).reshape(2, 3)
    check_refused(row, integers, "int16", forward_only=not row.preset)
    if row.name == "relu" and not row.keywords:
        y = relu_xp.ReLU().forward(integers, training=False)
        np.testing.assert_array_equal(y, np.maximum(integers, 0))


def bad_outs(result):
    """Return each `out` that cannot take a result, its error, and a word of that."""
    shape, dtype = result.shape, result.dtype
    locked = np.ones(shape, dtype)
    locked.flags.writeable = False
    return [
        (np.ones((7,), dtype), ValueError, r"\(7,\)"),
        (np.ones(shape, np.float64), TypeError, "float64"),
        ([1.0], TypeError, "list"),
        (locked, ValueError, "read-only"),
        (np.lib.stride_tricks.as_strided(np.ones(1, dtype), shape, (0, 0)), ValueError, "broadc"),
    ]


@pytest.mark.libraries("ndarray")
@each_row
def test_an_out_that_is_not_valid_is_refused_and_nothing_written(xp, row):
    y, pullback = row.call_vjp(xp, X)
    layer = row.make_layer(xp, 3)
    layer.forward(X)
    memory = np.full(40, 7, np.float32)
    for name, call, x, wanted in (
        (row.name, lambda x, out: row.call(xp, x, out=out), X, y),
        (row.vjp, lambda x, out: row.call_vjp(xp, x, out=out), X, y),
        ("forward", lambda x, out: layer.forward(x, out=out), X, y),
        ("forward", lambda x, out: layer.forward(x, out=out, training=False), X, y),
        ("pullback", lambda dy, out: pullback(dy, out=out), y, X),
        ("backward", lambda dy, out: layer.backward(dy, out=out), y, X),
    ):
        for out, error, word in bad_outs(wanted):
            before = np.copy(out)
            with pytest.raises(error, match=f"^{name}: out .*{word}"):
                call(x, out)
            np.testing.assert_array_equal(out, before)
        mine = memory[: x.size].reshape(x.shape)
        from_its_last = memory[x.size - 1 :][: wanted.size].reshape(wanted.shape)
        for out in (from_its_last, mine[..., ::-1] if wanted.shape == x.shape else from_its_last):
            with pytest.raises(ValueError, match=f"^{name}: out overlaps an input"):
                call(mine, out)
        assert (memory == 7).all()
    np.testing.assert_array_equal(x_gradient(pullback(y)), layer.backward(y))


@each_row
def test_an_array_of_another_library_or_device_is_refused(require, row):
    """The message says how to move an array."""
    strict = require("array_api_strict")
    there = strict.asarray(X.copy())
    y, pullback = row.call_vjp(NumPy, X)
    layer = row.make_layer(NumPy, 3)
    layer.forward(X)
    dy = strict.asarray(y.copy())
    found = [
        ("pullback: ", "dy", lambda: pullback(dy)),
        ("backward: ", "dy", lambda: layer.backward(dy)),
        (f"{row.name}: ", "out", lambda: row.call(NumPy, X, out=dy)),
        (f"{row.vjp}: ", "out", lambda: row.call_vjp(NumPy, X, out=dy)),
        ("pullback: ", "out", lambda: pullback(y, out=there)),
    ]
    if row.name == "relu":
        found += [
            ("relu_backward: ", "dy", lambda: relu_xp.relu_backward(there, X)),
            ("relu_vjp: ", "mask", lambda: relu_xp.relu_vjp(X, mask=there)),
        ]
    elif row.name == "prelu":
        found.append(("prelu: ", "weight", lambda: relu_xp.prelu(X, there[0, :])))
    elif row.name == "bias_relu":
        found += [
            ("bias_relu: ", "bias", lambda: relu_xp.bias_relu(X, there[0, :])),
            ("bias_relu_vjp: ", "mask", lambda: relu_xp.bias_relu_vjp(X, X[0], mask=there)),
        ]
    for start, argument, call in found:
        advice = rf".*numpy\.asarray\({argument}\)"
        if argument in ("out", "mask"):  # a copy would be lost
            advice = "give an array of NumPy"
        words = f"NumPy, {argument} is array_api_strict.*; {advice}"
        with pytest.raises(TypeError, match=f"^{start}.*{words}$"):
            call()
    np.testing.assert_array_equal(x_gradient(pullback(y)), layer.backward(y))
    if row.preset:
        _, pullback = row.call_vjp(NumPy, there)
        with pytest.raises(TypeError, match=r"dy is NumPy; .*array_api_strict\.asarray\(dy\)$"):
            pullback(X)
        elsewhere = strict.asarray(X.copy(), device=strict.Device("device1"))
        with pytest.raises(ValueError, match=r"^pullback: .*CPU_DEVICE.*, dy is .*device1"):
            pullback(elsewhere)


# ---- What is returned ---------------------------------------------------------------------------


@pytest.mark.libraries("writable")
@each_row
def test_out_is_what_is_returned(xp, row):
    """Of a function and its layer, in evaluation and in training."""
    host = np.linspace(-4, 8, 60, dtype=np.float32).reshape(6, 10)
    x, layer = xp.array(host.copy()), row.make_layer(xp)
    evaluated, trained = row.call(xp, x), row.call_vjp(xp, x)[0]
    for call, wanted in (
        (lambda out: row.call(xp, x, out=out), evaluated),
        (lambda out: layer.forward(x, out=out, training=False), evaluated),
        (lambda out: layer.forward(x, out=out), trained),
    ):
        out = xp.array(np.full_like(xp.numpy(wanted), 77))
        assert call(out) is out
        np.testing.assert_array_equal(xp.numpy(out), xp.numpy(wanted))
    np.testing.assert_array_equal(xp.numpy(x), host)


@pytest.mark.libraries("ndarray")
@each_row
def test_nan_infinity_and_subnormals_are_silent(xp, dtype, row):
    """Where a product is exact, also where NumPy is to raise."""
    smallest = np.array(1, f"u{DTYPES[dtype].itemsize}").view(DTYPES[dtype])
    values = [-np.inf, -1.0, -0.0, 0.0, 0.5, 2.0, np.inf, np.nan, smallest, -smallest]
    x = np.array([[float(v) for v in values]] * 20, DTYPES[dtype])
    with np.errstate(all="raise"):
        y, pullback = row.call_vjp(xp, x)
        row.call(xp, x)
        dx = x_gradient(pullback(np.concatenate([x, x], 1) if y.shape != x.shape else x))
        assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
        if row.name == "relu":
            relu_xp.relu_grad(x, **row.keywords)
            relu_xp.relu_backward(x, x, **row.keywords)


@each_row
def test_the_bytes_that_are_held(xp, row):
    """One bit per element, a byte with a third branch; else as the table of functions says."""
    for dtype in (xp.dtypes[0], xp.dtypes[-1]):
        host = np.ones((8, 25), DTYPES[dtype])
        x, layer = xp.array(host), row.make_layer(xp, 25)
        nbytes = row.call_vjp(xp, x)[1].saved_nbytes
        layer.forward(x)
        assert layer.saved_nbytes == nbytes
        if row.saved is None:
            three = {"negative_slope", "max_value"} <= {*row.keywords, *row.fixed}
            packed = 25 if not three else 200
            assert packed <= nbytes <= (packed + 7 if xp.strided else 200)
        else:
            assert nbytes == row.saved(host)


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "rrelu"])
def test_a_large_array_agrees_with_small_ones(xp, name):
    """Blocks and threads: the same bits at every place."""
    row, host = ROWS[name], np.random.default_rng(13).standard_normal((20, 20_001), np.float32)
    y, pullback = row.call_vjp(xp, xp.array(host))
    y, dx = xp.numpy(y), xp.numpy(x_gradient(pullback(y)))
    for i in (0, 1, 19):
        part, its_pullback = row.call_vjp(xp, xp.array(host[i : i + 1]))
        np.testing.assert_array_equal(xp.numpy(part)[0], y[i])
        np.testing.assert_array_equal(xp.numpy(x_gradient(its_pullback(part)))[0], dx[i])
