"""This package compared with PyTorch, JAX, Keras, Chainer and ONNX.

For ordinary numbers all of them agree. tests/README.md has a table of the other numbers, which is
computed here.
"""

from __future__ import annotations

import functools
import itertools
import platform
import re
import types
from pathlib import Path

import numpy as np
import pytest
from libraries import LIBRARIES, unavailable

import relu_xp

README = (Path(__file__).parents[1] / "README.md").read_text()
FRAMEWORKS = ("PyTorch", "JAX", "Keras", "Chainer", "ONNX")
# The calls that are compared, from the first table of that section: ROWS[call][framework].
TABLE = re.search(r"^## Other frameworks$.*?^(\|.*?)\n\n", README, re.MULTILINE | re.DOTALL)[1]
CELLS = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in TABLE.splitlines()[2:]]
ROWS = {call: dict(zip(FRAMEWORKS, codes, strict=True)) for call, *codes in CELLS}

KEYWORDS = {  # of `relu_backward`, where it is the gradient
    "relu(x)": {},
    "leaky_relu(x, 0.1)": {"negative_slope": 0.1},
    "leaky_relu(x, 0)": {"negative_slope": 0},
    "relu6(x)": {"max_value": 6},
    "clipped_relu(x, 20)": {"max_value": 20},
    "thresholded_relu(x, 1)": {"threshold": 1},
    "relu(x, threshold=1, negative_slope=0.1)": {"threshold": 1, "negative_slope": 0.1},
    "relu(x, max_value=3, negative_slope=0.1)": {"max_value": 3, "negative_slope": 0.1},
}
WEIGHTS = {"prelu(x, w)": 0.1, "prelu(x, zero)": 0.0}  # one for each column of x
PRODUCTS = ("leaky", "slope", "prelu(x, w)", "rrelu", "squared")  # the others only select
MEAN = (1 / 8 + 1 / 3) / 2  # of rrelu's slopes


# Each of the following returns a function of an expression of the table, x and a weight if there is
# one. That returns f(x) and the pullback: from dy to the gradients of x and the weight, as a tuple.


def names_of(code, operands):
    return dict(zip(("x", "zero" if "zero" in code else "w"), operands, strict=False))


def ours(call, x, *weight):
    names = names_of(call, (x, *weight))
    y = eval(call, vars(relu_xp), names)
    if call in KEYWORDS:
        return y, lambda dy: (relu_xp.relu_backward(dy, x, **KEYWORDS[call]),)
    again, pullback = eval(call.replace("(", "_vjp(", 1), vars(relu_xp), names)
    np.testing.assert_array_equal(again, y)
    return y, lambda dy: pullback(dy) if weight else (pullback(dy),)


def pytorch(require):
    torch = require("torch")

    def run(code, *operands):
        operands = [torch.from_numpy(operand.copy()).requires_grad_() for operand in operands]
        names = {"torch": torch, "F": torch.nn.functional, **names_of(code, operands)}
        y = eval(code, names)
        grad = functools.partial(torch.autograd.grad, y, operands, retain_graph=True)
        return y.detach().numpy(), lambda dy: tuple(g.numpy() for g in grad(torch.from_numpy(dy)))

    return run


def jax(require, **names):
    jax = require("jax")
    LIBRARIES["jax"].load()  # float64
    names = {"jnp": jax.numpy, "nn": jax.nn, **names}

    def run(code, *operands):
        def function(*operands):
            return eval(code, {**names, **names_of(code, operands)})

        y, vjp = jax.vjp(function, *map(jax.numpy.asarray, operands))
        return np.asarray(y), lambda dy: tuple(map(np.asarray, vjp(jax.numpy.asarray(dy))))

    return run


def keras(require):
    require("jax")
    keras = require("keras")

    def PReLU(x, weight):  # noqa: N802
        layer = keras.layers.PReLU(dtype=str(x.dtype))
        layer.build(x.shape)
        return layer.stateless_call([weight], [], x)[0]

    return jax(require, activations=keras.activations, ops=keras.ops, PReLU=PReLU)


def onnx(require):
    """Return the reference evaluator; the operators have no gradients."""
    onnx = require("onnx")
    require("onnx.reference")

    def call(operator, x, *operands, **attributes):
        feed = {f"x{i}": np.asarray(operand, x.dtype) for i, operand in enumerate((x, *operands))}
        node = onnx.helper.make_node(operator, list(feed), ["y"], **attributes)
        return onnx.reference.ReferenceEvaluator(node).run(None, feed)[0]

    names = {one.name: functools.partial(call, one.name) for one in onnx.defs.get_all_schemas()}
    return lambda code, *operands: (eval(code, names, names_of(code, operands)), None)


def chainer(require):
    """Return Chainer 7.8.1's code for a CPU, from chainer/functions/activation/*.py.

    Its last release (2022) can neither be installed beside a current setuptools (it imports
    pkg_resources) nor imported beside NumPy 2 (it uses numpy.sctypes).
    """

    def relu(x):
        y = np.maximum(x, 0, dtype=x.dtype)
        return y, lambda dy: (dy * (y > 0),)

    def leaky_relu(x, slope):
        def scale(values, mask):
            values = values.copy()
            values[mask] *= slope
            return values

        y = scale(x, x <= 0)
        return y, lambda dy: (scale(dy, y <= 0),)

    def clipped_relu(x, z):
        y = np.minimum(np.maximum(0, x), z, dtype=x.dtype)
        return y, lambda dy: (dy * (x > 0) * (x < z),)

    def prelu(x, weight):
        keep = x >= 0
        return np.where(keep, x, x * weight), lambda dy: (
            np.where(keep, dy, dy * weight),
            np.where(keep, 0, x * dy).sum(axis=0),
        )

    def rrelu(x):
        slopes = np.full(x.shape, MEAN, x.dtype)
        y = np.where(x >= 0, x, x * slopes)
        return y, lambda dy: (np.where(y >= 0, dy, dy * slopes),)

    def crelu(x):
        zero = x.dtype.type(0)
        y = np.concatenate([np.maximum(zero, x), np.maximum(zero, -x)], 1)

        def pullback(dy):
            former, latter = np.split(dy, 2, 1)
            return (former * (x > 0) - latter * (x < 0),)

        return y, pullback

    names = {"F": types.SimpleNamespace(**locals())}
    return lambda code, *operands: eval(code, names, names_of(code, operands))


@pytest.fixture(scope="module")
def framework(require, tmp_path_factory):
    """Return a function from a framework's name to a function for each call that it has."""

    def functions(name):
        run = globals()[name.lower()](require)
        codes = {call: row[name] for call, row in ROWS.items() if row[name]}
        return {call: functools.partial(run, code) for call, code in codes.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))  # it writes a file there
        yield functions


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_ordinary_numbers_agree(name, dtype, framework):
    rng = np.random.default_rng(0)
    x, *dys = (rng.normal(scale=15, size=(67, 66)).astype(dtype) for _ in range(3))
    tolerance = 4 * np.finfo(dtype).eps
    for call, function in framework(name).items():
        weight = [np.full(x.shape[1], WEIGHTS[call], dtype)] if call in WEIGHTS else []
        y, pullback = ours(call, x, *weight)
        expected, their_pullback = function(x, *weight)
        if name == "Keras" and "threshold=1" in call:  # another function
            np.testing.assert_allclose(expected, np.where(x > 1, x, 0.1 * (x - 1)), 1e-6)
            continue
        rounding = tolerance if any(word in call for word in PRODUCTS) else 0
        if name == "ONNX" and "leaky" in call:  # an attribute is a float32, whatever x is
            rounding = max(rounding, float(np.finfo(np.float32).eps))
        assert y.dtype == expected.dtype == dtype
        np.testing.assert_allclose(y, expected, rounding, err_msg=call)
        if their_pullback is None:
            continue
        dy = np.concatenate(dys, 1) if y.shape != x.shape else dys[0]
        dx, *dw = pullback(dy)
        their_dx, *their_dw = their_pullback(dy)
        assert dx.dtype == their_dx.dtype == dtype
        np.testing.assert_allclose(dx, their_dx, rounding, err_msg=call)
        for gradient, other in zip(dw, their_dw, strict=True):
            assert gradient.dtype == other.dtype == dtype
            error = abs(gradient - other) / abs(x * dy).sum(axis=0)  # of sums in another order
            assert (error < tolerance).all(), call


POINTS = ("-inf", "-1", "-0.0", "0.0", "1e-40", "1", "3", "6", "20", "inf", "nan")
GRADIENTS = (1.0, -1.0, np.nan, np.inf)


def format_value(numbers):
    texts = [f"{float(f'{number:.3g}')}" for number in numbers]
    return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"


def format_factor(values):
    """Return what a gradient is, as a multiple of dy, from its values for each of GRADIENTS."""
    one, minus, nan, inf = values
    if np.isnan(one):
        assert np.isnan(values).all()
        return "nan"
    assert minus == -one
    if not np.isnan(nan):
        assert not any(values)
        return "±0" if any(np.signbit(values)) else "0"
    factor = f"{abs(one) if one == 0 else one:.3g}"
    factors = {"1": "dy", "-1": "-dy", "0.1": "a·dy", f"{MEAN:.3g}": "a·dy"}
    text = factors.get(factor, f"{factor}·dy")
    return text if str(inf) == str(one * np.inf) else f"{text} but {inf} for inf"


def results(run, call, point):
    """Return f(x), dx and dw at one point, as text.

    There are so many elements that vector instructions and the remainder loop both take part.
    """
    x = np.full((1, 133), float(point), np.float32)
    weight = [np.full(x.shape[1], WEIGHTS[call], x.dtype)] if call in WEIGHTS else []
    with np.errstate(all="ignore"):
        y, pullback = run(x, *weight)
        texts = {"f(x)": [format_value(column) for column in y.reshape(-1, x.shape[1]).T]}
        if pullback is not None:
            gradients = zip(*(pullback(np.full_like(y, dy)) for dy in GRADIENTS), strict=True)
            for what, columns in zip(("dx", "dw"), map(np.stack, gradients), strict=False):
                if what == "dw":
                    columns = columns + 0.0  # the sign of a sum that is zero has no meaning
                texts[what] = [format_factor(column) for column in columns.reshape(4, -1).T]
    return {what: " or ".join(sorted(set(cells))) for what, cells in texts.items()}


def format_points(points):
    """Return points as text, consecutive ones as a range."""
    texts = []
    for _, run in itertools.groupby(enumerate(map(POINTS.index, points)), lambda p: p[1] - p[0]):
        ends = [POINTS[number] for _, number in run]
        texts.append(", ".join(ends) if len(ends) < 3 else f"{ends[0]} … {ends[-1]}")
    return ", ".join(texts)


def format_cell(texts):
    """Return a dictionary from points to results as one text."""
    points = {}
    for point, text in texts.items():
        points.setdefault(text, []).append(point)
    return "; ".join(f"{text} at {format_points(where)}" for text, where in points.items())


def table(frameworks):
    """Return the table of all that differs."""
    rows = {}
    for call in ROWS:
        own = {point: results(functools.partial(ours, call), call, point) for point in POINTS}
        others = [
            {point: results(functions[call], call, point) for point in POINTS}
            if call in functions
            else {"nan": {}}
            for functions in frameworks.values()
        ]
        for what in own["nan"]:
            cells, differing = [], set()
            for other in others:
                if what not in other["nan"]:
                    cells.append("none")
                    continue
                texts = {p: other[p][what] for p in POINTS if other[p][what] != own[p][what]}
                differing.update(texts)
                cells.append(format_cell(texts) or "same")
            if differing:
                texts = {point: own[point][what] for point in POINTS if point in differing}
                rows.setdefault((what, format_cell(texts), *cells), []).append(call)
    lines = [f"| | | relu_xp | {' | '.join(frameworks)} |", "|---" * (3 + len(frameworks)) + "|"]
    for (what, *cells), calls in rows.items():
        code = ", ".join(f"`{call}`" for call in calls)
        lines.append(f"| {code} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_table_of_differences_is_computed(framework, request):
    if platform.machine() not in ("x86_64", "AMD64"):
        unavailable(request.config, "the table holds for x86 processors: signs of zero differ")
    text = table({name: framework(name) for name in FRAMEWORKS})
    assert text in README, f"tests/README.md should have\n{text}"


OPERATORS = {  # with ONNX's names of the keywords, and their defaults
    "Relu": (relu_xp.relu, {}),
    "LeakyRelu": (relu_xp.leaky_relu, {"alpha": ("negative_slope", 0.01)}),
    "ThresholdedRelu": (relu_xp.thresholded_relu, {"alpha": ("threshold", 1.0)}),
    "PRelu": (relu_xp.prelu, {}),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_onnx_node_tests_pass_as_they_are(require, monkeypatch, operator):
    """With the arrays in the shapes that they have there."""
    require("onnx.backend.test.case.node")  # which imports all cases, in the right order
    module = require(f"onnx.backend.test.case.node.{operator.lower()}")
    cases = []
    monkeypatch.setattr(module, "expect", lambda node, **case: cases.append((node, case)))
    exports = vars(getattr(module, operator))
    for name in [name for name in exports if name.startswith("export")]:
        getattr(getattr(module, operator), name)()
    cases = [(node, case) for node, case in cases if node.op_type == operator]
    assert len(cases) >= {"Relu": 1, "PRelu": 2}.get(operator, 3)
    function, keywords = OPERATORS[operator]
    for node, case in cases:
        given = {attribute.name: attribute.f for attribute in node.attribute}
        options = {ours: given.get(name, default) for name, (ours, default) in keywords.items()}
        y = function(*case["inputs"], **options)
        np.testing.assert_allclose(y, case["outputs"][0], rtol=1e-6)
        assert y.dtype == case["outputs"][0].dtype
