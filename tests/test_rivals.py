"""Ours beside PyTorch, JAX, Keras, Chainer and ONNX.

Where nothing is special about the numbers, all of them agree. Where they do not, the README's table
says so, and the table is computed here.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import platform

import numpy as np
import pytest
from conftest import unavailable
from libraries import LIBRARIES
from test_readme import README

import relu_xp

# What is compared, by the call that makes it, with relu_backward's keywords where that is the
# gradient; w is an array of 0.1, zero one of 0, a slope for each column of x.
MEMBERS = {
    "relu(x)": {},
    "leaky_relu(x, 0.1)": {"negative_slope": 0.1},
    "leaky_relu(x, 0)": {"negative_slope": 0},
    "relu6(x)": {"max_value": 6},
    "clipped_relu(x, 20)": {"max_value": 20},
    "thresholded_relu(x, 1)": {"threshold": 1},
    "relu(x, threshold=1, negative_slope=0.1)": {"threshold": 1, "negative_slope": 0.1},
    "relu(x, max_value=3, negative_slope=0.1)": {"max_value": 3, "negative_slope": 0.1},
    "prelu(x, w)": None,
    "prelu(x, zero)": None,
    "rrelu(x)": None,
    "crelu(x)": None,
    "squared_relu(x)": None,
}
PRODUCTS = ("leaky", "slope", "prelu(x, w)", "rrelu", "squared")  # the others only select
SLOPES = {"prelu(x, w)": 0.1, "prelu(x, zero)": 0.0}
MEAN = (1 / 8 + 1 / 3) / 2


def ours(member, x, slopes=None):
    """Return f(x) and a function from dy to the gradients, of x and of the slopes if there are."""
    names = {"x": x, "w": slopes, "zero": slopes}
    y = eval(member, vars(relu_xp), names)
    if (numbers := MEMBERS[member]) is not None:
        return y, lambda dy: (relu_xp.relu_backward(dy, x, **numbers),)
    again, pullback = eval(member.replace("(", "_vjp(", 1), vars(relu_xp), names)
    np.testing.assert_array_equal(again, y)
    return y, lambda dy: pullback(dy) if slopes is not None else (pullback(dy),)


class Torch:
    def __init__(self, require):
        torch = require("torch")
        f = torch.nn.functional
        self.torch = torch
        self.functions = {
            "relu(x)": f.relu,
            "leaky_relu(x, 0.1)": lambda x: f.leaky_relu(x, 0.1),
            "leaky_relu(x, 0)": lambda x: f.leaky_relu(x, 0.0),
            "relu6(x)": f.relu6,
            "clipped_relu(x, 20)": lambda x: f.hardtanh(x, 0.0, 20.0),
            "thresholded_relu(x, 1)": lambda x: f.threshold(x, 1.0, 0.0),
            "prelu(x, w)": f.prelu,
            "prelu(x, zero)": f.prelu,
            "rrelu(x)": lambda x: f.rrelu(x, training=False),
            "crelu(x)": lambda x: torch.cat([f.relu(x), f.relu(-x)], 1),
            "squared_relu(x)": lambda x: f.relu(x).square(),
        }

    def __call__(self, member, *operands):
        convert = self.torch.from_numpy
        operands = [convert(operand.copy()).requires_grad_() for operand in operands]
        y = self.functions[member](*operands)

        def pullback(dy):
            gradients = self.torch.autograd.grad(y, operands, convert(dy), retain_graph=True)
            return tuple(gradient.numpy() for gradient in gradients)

        return y.detach().numpy(), pullback


class Jax:
    def __init__(self, require):
        self.jax = require("jax")
        LIBRARIES["jax"].load()  # float64
        jnp, nn = self.jax.numpy, self.jax.nn
        self.functions = {
            "relu(x)": nn.relu,
            "leaky_relu(x, 0.1)": lambda x: nn.leaky_relu(x, 0.1),
            "leaky_relu(x, 0)": lambda x: nn.leaky_relu(x, 0.0),
            "relu6(x)": nn.relu6,
            "clipped_relu(x, 20)": lambda x: jnp.clip(x, 0.0, 20.0),
            "prelu(x, w)": nn.leaky_relu,
            "prelu(x, zero)": nn.leaky_relu,
            "crelu(x)": lambda x: jnp.concatenate([nn.relu(x), nn.relu(-x)], 1),
            "squared_relu(x)": lambda x: jnp.square(nn.relu(x)),
        }

    def __call__(self, member, *operands):
        jnp = self.jax.numpy
        y, vjp = self.jax.vjp(self.functions[member], *map(jnp.asarray, operands))
        return np.asarray(y), lambda dy: tuple(map(np.asarray, vjp(jnp.asarray(dy))))


class Keras(Jax):
    """Keras on JAX."""

    def __init__(self, require):
        super().__init__(require)
        keras = require("keras")
        relu = keras.activations.relu
        self.keras = keras
        self.functions = {
            "relu(x)": relu,
            "leaky_relu(x, 0.1)": lambda x: keras.activations.leaky_relu(x, 0.1),
            "leaky_relu(x, 0)": lambda x: keras.activations.leaky_relu(x, 0.0),
            "relu6(x)": keras.activations.relu6,
            "clipped_relu(x, 20)": lambda x: relu(x, max_value=20),
            "thresholded_relu(x, 1)": lambda x: relu(x, threshold=1),
            "relu(x, threshold=1, negative_slope=0.1)": (
                lambda x: relu(x, threshold=1, negative_slope=0.1)
            ),
            "relu(x, max_value=3, negative_slope=0.1)": (
                lambda x: relu(x, max_value=3, negative_slope=0.1)
            ),
            "prelu(x, w)": self.prelu,
            "prelu(x, zero)": self.prelu,
            "crelu(x)": lambda x: keras.ops.concatenate([relu(x), relu(-x)], 1),
            "squared_relu(x)": lambda x: keras.ops.square(relu(x)),
        }

    def prelu(self, x, slopes):
        layer = self.keras.layers.PReLU(dtype=str(x.dtype))
        layer.build(x.shape)
        return layer.stateless_call([slopes], [], x)[0]


class Chainer:
    """Chainer 7.8.1's code for a CPU, from chainer/functions/activation/*.py.

    Its last release (2022) can neither be installed beside a setuptools of today (it imports
    pkg_resources) nor imported beside NumPy 2 (it asks for numpy.sctypes).
    """

    def __init__(self, require):
        self.functions = {
            "relu(x)": self.relu,
            "leaky_relu(x, 0.1)": functools.partial(self.leaky_relu, slope=0.1),
            "leaky_relu(x, 0)": functools.partial(self.leaky_relu, slope=0.0),
            "relu6(x)": functools.partial(self.clipped_relu, z=6.0),
            "clipped_relu(x, 20)": functools.partial(self.clipped_relu, z=20.0),
            "prelu(x, w)": self.prelu,
            "prelu(x, zero)": self.prelu,
            "rrelu(x)": self.rrelu,
            "crelu(x)": self.crelu,
        }

    def __call__(self, member, *operands):
        return self.functions[member](*operands)

    def relu(self, x):
        y = np.maximum(x, 0, dtype=x.dtype)
        return y, lambda dy: (dy * (y > 0),)

    def leaky_relu(self, x, slope):
        y = x.copy()
        y[x <= 0] *= slope

        def pullback(dy):
            dx = dy.copy()
            dx[y <= 0] *= slope
            return (dx,)

        return y, pullback

    def clipped_relu(self, x, z):
        y = np.minimum(np.maximum(0, x), z, dtype=x.dtype)
        return y, lambda dy: (dy * (x > 0) * (x < z),)

    def prelu(self, x, slopes):
        keep = x >= 0
        return np.where(keep, x, x * slopes), lambda dy: (
            np.where(keep, dy, dy * slopes),
            np.where(keep, 0, x * dy).sum(axis=0),
        )

    def rrelu(self, x):
        slopes = np.full(x.shape, MEAN, x.dtype)
        y = np.where(x >= 0, x, x * slopes)
        return y, lambda dy: (np.where(y >= 0, dy, dy * slopes),)

    def crelu(self, x):
        zero = x.dtype.type(0)
        y = np.concatenate([np.maximum(zero, x), np.maximum(zero, -x)], 1)

        def pullback(dy):
            former, latter = np.split(dy, 2, 1)
            return (former * (x > 0) - latter * (x < 0),)

        return y, pullback


class Onnx:
    """The reference evaluator; the operators have no gradients."""

    def __init__(self, require):
        self.onnx = require("onnx")
        require("onnx.reference")
        op = self.operator

        def clip(x, high):
            return op("Clip", x, x.dtype.type(0), x.dtype.type(high))

        self.functions = {
            "relu(x)": lambda x: op("Relu", x),
            "leaky_relu(x, 0.1)": lambda x: op("LeakyRelu", x, alpha=0.1),
            "leaky_relu(x, 0)": lambda x: op("LeakyRelu", x, alpha=0.0),
            "relu6(x)": lambda x: clip(x, 6),
            "clipped_relu(x, 20)": lambda x: clip(x, 20),
            "thresholded_relu(x, 1)": lambda x: op("ThresholdedRelu", x, alpha=1.0),
            "prelu(x, w)": lambda x, slopes: op("PRelu", x, slopes),
            "prelu(x, zero)": lambda x, slopes: op("PRelu", x, slopes),
            "crelu(x)": lambda x: op("Concat", op("Relu", x), op("Relu", op("Neg", x)), axis=1),
            "squared_relu(x)": lambda x: op("Mul", *[op("Relu", x)] * 2),
        }

    def operator(self, operator, *operands, **attributes):
        feed = {f"x{i}": np.asarray(operand) for i, operand in enumerate(operands)}
        node = self.onnx.helper.make_node(operator, list(feed), ["y"], **attributes)
        return self.onnx.reference.ReferenceEvaluator(node).run(None, feed)[0]

    def __call__(self, member, *operands):
        return self.functions[member](*operands), None


RIVALS = {"PyTorch": Torch, "JAX": Jax, "Keras": Keras, "Chainer": Chainer, "ONNX": Onnx}


@pytest.fixture(scope="module")
def keras_home(tmp_path_factory):
    """Keras reads its backend when it is imported, and writes a file into its home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        yield


@pytest.fixture
def rival(keras_home, require):
    """Return a function that makes a rival by its name, if its library is installed."""
    return lambda name: RIVALS[name](require)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RIVALS)
def test_ordinary_numbers_agree(name, dtype, rival):
    theirs, rng = rival(name), np.random.default_rng(0)
    x, *dys = (rng.normal(scale=15, size=(67, 66)).astype(dtype) for _ in range(3))
    tolerance = 4 * np.finfo(dtype).eps
    for member in theirs.functions:
        operands = [x]
        if member in SLOPES:
            operands.append(np.full(x.shape[1], SLOPES[member], dtype))
        y, pullback = ours(member, *operands)
        expected, their_pullback = theirs(member, *operands)
        if name == "Keras" and "threshold=1" in member:  # that is another function there
            np.testing.assert_allclose(expected, np.where(x > 1, x, 0.1 * (x - 1)), 1e-6)
            continue
        rounding = tolerance if any(word in member for word in PRODUCTS) else 0
        if name == "ONNX" and "leaky" in member:  # an attribute is a float32, whatever x is
            rounding = max(rounding, float(np.finfo(np.float32).eps))
        assert y.dtype == expected.dtype == dtype
        np.testing.assert_allclose(y, expected, rounding, err_msg=member)
        if their_pullback is None:
            continue
        dy = np.concatenate(dys, 1) if y.shape != x.shape else dys[0]
        dx, *dslopes = pullback(dy)
        their_dx, *their_dslopes = their_pullback(dy)
        assert dx.dtype == their_dx.dtype == dtype
        np.testing.assert_allclose(dx, their_dx, rounding, err_msg=member)
        for dw, their_dw in zip(dslopes, their_dslopes, strict=True):
            assert dw.dtype == their_dw.dtype == dtype
            error = abs(dw - their_dw) / abs(x * dy).sum(axis=0)  # of sums in another order
            assert (error < tolerance).all(), member


@pytest.fixture
def onnx_cases(require):
    """Yield the inputs and outputs that ONNX publishes for an operator, with its attributes."""

    def cases(operator, count):
        require("onnx.reference")  # a clear reason if ONNX is not there
        importlib.import_module(f"onnx.backend.test.case.node.{operator.lower()}")
        from onnx.backend.test.case.node import _NodeTestCases

        found = 0
        for case in _NodeTestCases:
            (node, *more), graph = case.model.graph.node, case.model.graph
            if node.op_type != operator or more or len(graph.output) != 1:
                continue
            attributes = {attribute.name: attribute.f for attribute in node.attribute}
            for inputs, (y,) in case.data_sets:
                found += 1
                names = [name for name in node.input if name]
                yield dict(zip(names, inputs, strict=True)), attributes, y
        assert found == count

    return cases


def close(y, expected):
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)


def test_onnx_relu(onnx_cases):
    for feed, _, y in onnx_cases("Relu", 1):
        np.testing.assert_array_equal(relu_xp.relu(feed["x"]), y)


def test_onnx_leaky_relu(onnx_cases):
    for feed, attributes, y in onnx_cases("LeakyRelu", 3):
        close(relu_xp.leaky_relu(feed["x"], attributes.get("alpha", 0.01)), y)


def test_onnx_thresholded_relu(onnx_cases):
    for feed, attributes, y in onnx_cases("ThresholdedRelu", 3):
        ours = relu_xp.thresholded_relu(feed["x"], attributes.get("alpha", 1.0))
        np.testing.assert_array_equal(ours, y)


def test_onnx_prelu(onnx_cases):
    for feed, _, y in onnx_cases("PRelu", 2):
        x, slope = feed["x"], feed["slope"]
        if slope.shape == x.shape:  # a slope for every element
            x, slope, y = x.ravel(), slope.ravel(), y.ravel()
        close(relu_xp.prelu(x, slope, axis=-1), y)


def test_onnx_clip(onnx_cases):
    """Clip is a ReLU of x - min, where there is a min, and a max beyond it if there is one."""
    relus = 0
    for feed, _, y in onnx_cases("Clip", 12):
        x, low, high = feed["x"], feed.get("min"), feed.get("max")
        if low is None or (high is not None and high < low):
            continue
        relus += 1
        ceiling = None if high is None else float(high - low)
        close(relu_xp.relu(x - low, max_value=ceiling) + low, y)
    assert relus == 7


POINTS = ("-inf", "-1", "-0.0", "0.0", "1e-40", "1", "3", "6", "20", "inf", "nan")
GRADIENTS = (1.0, -1.0, np.nan, np.inf)


def value(numbers):
    texts = [f"{float(f'{number:.3g}')}" for number in numbers]
    return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"


def law(values):
    """Return what a gradient makes of dy, by what came out for each of GRADIENTS."""
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


def behaviour(run, member, point):
    """Return f(x), dx and dw at one point, as text.

    There are so many elements that a vector's lanes as well as what is left over show what they do.
    """
    x = np.full((1, 133), float(point), np.float32)
    operands = [np.full(x.shape[1], SLOPES[member], x.dtype)] if member in SLOPES else []
    with np.errstate(all="ignore"):
        y, pullback = run(member, x, *operands)
        texts = {"f(x)": [value(column) for column in y.reshape(-1, x.shape[1]).T]}
        if pullback is not None:
            gradients = zip(*(pullback(np.full_like(y, dy)) for dy in GRADIENTS), strict=True)
            for what, columns in zip(("dx", "dw"), map(np.stack, gradients), strict=False):
                if what == "dw":
                    columns = columns + 0.0  # the sign of a sum that is zero says nothing
                texts[what] = [law(column) for column in columns.reshape(4, -1).T]
    return {what: " or ".join(sorted(set(cells))) for what, cells in texts.items()}


def rule(what, member, point, text):
    """Return the number of the rule by which ours does what the text says."""
    if point == "nan":
        return "F2" if what == "f(x)" else "G2"
    if what == "dw":
        return "G1"
    numbers, x = MEMBERS[member] or {}, float(point)
    if numbers.get("threshold", 0) < x < 1:
        return "F4"
    if what == "f(x)":
        return "F1" if numbers.get("negative_slope", SLOPES.get(member)) else "F3"
    if "max_value" in numbers and x >= numbers["max_value"]:
        return "G4"
    return "G1" if text == "a·dy" else "G3"


def ranges(points):
    """Return points as text, those that follow each other as one range."""
    numbers = sorted(map(POINTS.index, points))
    texts = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        ends = [POINTS[number] for _, number in run]
        texts.append(", ".join(ends) if len(ends) < 3 else f"{ends[0]} … {ends[-1]}")
    return ", ".join(texts)


def cell(answers):
    """Return a dictionary from points to texts as one text: what comes out, and where."""
    where = {}
    for point, text in answers.items():
        where.setdefault(text, []).append(point)
    return "; ".join(f"{text} at {ranges(points)}" for text, points in where.items())


def table(rivals):
    """Return the README's table of all that differs: of each rival, where and how."""
    rows = {}
    for member in MEMBERS:
        own = {point: behaviour(ours, member, point) for point in POINTS}
        theirs = [
            {point: behaviour(rival, member, point) for point in POINTS}
            if member in rival.functions
            else None
            for rival in rivals.values()
        ]
        for what in own["nan"]:
            cells, differing = [], set()
            for their in theirs:
                if their is None or what not in their["nan"]:
                    cells.append("none")
                    continue
                answers = {
                    point: texts[what]
                    for point, texts in their.items()
                    if texts[what] != own[point][what]
                }
                differing.update(answers)
                cells.append(cell(answers) or "same")
            if differing:
                answers = {point: own[point][what] for point in POINTS if point in differing}
                rules = sorted({rule(what, member, point, answers[point]) for point in answers})
                row = (what, cell(answers), *cells, ", ".join(rules))
                rows.setdefault(row, []).append(member)
    lines = [f"| | | ours | {' | '.join(rivals)} | rules |", "|---" * (4 + len(rivals)) + "|"]
    for (what, *cells), members in rows.items():
        code = ", ".join(f"`{member}`" for member in members)
        lines.append(f"| {code} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_differences_is_computed(rival, request):
    if platform.machine() not in ("x86_64", "AMD64"):
        unavailable(request.config, "the table is that of an x86 processor, by its signs of zero")
    text = table({name: rival(name) for name in RIVALS})
    assert text in README.read_text(), f"the README should have\n{text}"
