"""The rules that every backend has to obey, as tests, to the bit.

The author of a backend runs, with its package installed::

    pytest -p relu_xp.testing --pyargs relu_xp.testing.conformance --xp NAME

for the library NAME, which is any that `relu_xp.dispatch.namespace` imports: all floating dtypes
that it can exchange with NumPy, against an oracle that computes with integers. Where a library's
own operations flush subnormals or change the payload of a NaN, rules F2 and F4 hold as far as it
does; that is found out by asking it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

import relu_xp
from relu_xp.activation import Activation, Rounded
from relu_xp.arrays import to_numpy
from relu_xp.backends import Backend
from relu_xp.dispatch import backend_for
from relu_xp.testing import oracle

try:
    import pytest
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "relu_xp.testing.conformance needs pytest: pip install pytest", name="pytest"
    ) from None

_Host = npt.NDArray[Any]

# What a library may warn of when a product overflows, or when it meets a signalling NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")

_each_member = pytest.mark.parametrize("member", oracle.MEMBERS)
_each_kind = pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"negative_slope": 0.5, "max_value": 2.0},
        {"threshold": 0.5, "positive_slope": 0.5},  # f(x) lies in another piece than x
    ],
    ids=["relu", "three-pieces", "threshold"],
)


class Library:
    """A library, and what the tests need to know of it.

    Parameters
    ----------
    xp : module
        Its array API namespace.

    Attributes
    ----------
    name : str
    dtypes : tuple of str
        The floating dtypes that it has and exchanges with NumPy.
    subnormals : bool
        Whether its own operations keep them.
    payloads : bool
        Whether its own ``where`` keeps the payload of a NaN.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._kind = type(xp.asarray([0.0]))
        self.name = str(xp.__name__)
        with warnings.catch_warnings(action="ignore"):
            self.dtypes = tuple(filter(self._has, oracle.DTYPES))
            self.subnormals = all(map(self._keeps_subnormals, self.dtypes))
            self.payloads = all(map(self._keeps_payloads, self.dtypes))

    def array(self, host: _Host) -> Any:
        """Return an array of the library with a NumPy array's values and dtype."""
        return self._xp.asarray(host.copy())

    def numpy(self, x: Any) -> _Host:
        """Return a NumPy array with the values and dtype of an array of the library."""
        assert isinstance(x, self._kind), f"got {type(x)}, expected {self._kind}"
        return to_numpy(x)

    def _has(self, dtype: str) -> bool:
        host = np.ones(1, oracle.DTYPES[dtype])
        try:
            return bool(self.numpy(self.array(host)).dtype == host.dtype)
        except Exception:  # whatever a library raises at what it does not know
            return False

    def _keeps_subnormals(self, dtype: str) -> bool:
        form = oracle.Format(dtype)
        normal = np.array([1 << form.fraction], form.unsigned)
        half = self.array(np.full(1, 0.5, form.dtype))
        product = self.numpy(self.array(normal.view(form.dtype)) * half).view(form.unsigned)
        return self._keeps(normal >> 1, form) and np.array_equal(product, normal >> 1)

    def _keeps_payloads(self, dtype: str) -> bool:
        form = oracle.Format(dtype)
        bits = oracle.specials(dtype)
        return self._keeps(bits[oracle.is_nan(form, bits)], form)

    def _keeps(self, bits: _Host, form: oracle.Format) -> bool:
        x = self.array(bits.view(form.dtype))
        kept = self.numpy(self._xp.where(x <= 0, self._xp.zeros_like(x), x))
        return np.array_equal(kept.view(form.unsigned), bits)


_library = functools.cache(Library)


@pytest.fixture
def library(xp: Any) -> Library:
    """Return the library under test."""
    return _library(xp)


@pytest.fixture(params=oracle.DTYPES)
def dtype(request: pytest.FixtureRequest, library: Library) -> str:
    """One of its floating dtypes."""
    name: str = request.param
    if name not in library.dtypes:
        pytest.skip(f"{library.name} has no {name} that NumPy takes")
    return name


def array_of(library: Library, patterns: _Host, dtype: str) -> Any:
    """Return an array of the library with these bit patterns."""
    return library.array(patterns.view(oracle.DTYPES[dtype]))


def check(library: Library, result: Any, expected: oracle.Expected, *inputs: _Host) -> None:
    """Raise AssertionError unless a result has the bits expected, as far as the library can."""
    expected.check(
        library.numpy(result),
        *inputs,
        subnormals=library.subnormals,
        payloads=library.payloads,
    )


@_each_member
def test_forward(library: Library, dtype: str, member: str) -> None:
    """F1 to F4, N1: f(x) of every bit pattern, or of many."""
    patterns = oracle.patterns(dtype)
    y = relu_xp.relu(array_of(library, patterns, dtype), **oracle.MEMBERS[member])
    check(library, y, oracle.forward(dtype, member), patterns)


@_each_member
def test_grad(library: Library, dtype: str, member: str) -> None:
    """G1, G2, G4: f'(x) likewise."""
    patterns = oracle.patterns(dtype)
    g = relu_xp.relu_grad(array_of(library, patterns, dtype), **oracle.MEMBERS[member])
    check(library, g, oracle.gradient(dtype, member), patterns)


@_each_member
def test_backward_from_input(library: Library, dtype: str, member: str) -> None:
    """G1 to G4, D2: f'(x) * dy, with dy of every dtype."""
    patterns = oracle.patterns(dtype)
    for other in library.dtypes:
        gradients = oracle.gradients(other, patterns.size)
        dx = relu_xp.relu_backward(
            array_of(library, gradients, other),
            array_of(library, patterns, dtype),
            **oracle.MEMBERS[member],
        )
        check(library, dx, oracle.backward(dtype, other, member), gradients, patterns)


@_each_member
def test_vjp(library: Library, dtype: str, member: str) -> None:
    """The same from what was saved; a pullback may be called any number of times."""
    patterns = oracle.patterns(dtype)
    x = array_of(library, patterns, dtype)
    y, pullback = relu_xp.relu_vjp(x, **oracle.MEMBERS[member])
    check(library, y, oracle.forward(dtype, member), patterns)
    for other in (*library.dtypes, library.dtypes[0]):
        gradients = oracle.gradients(other, patterns.size)
        dx = pullback(array_of(library, gradients, other))
        check(library, dx, oracle.backward(dtype, other, member), gradients, patterns)


def test_prelu_obeys_the_table(library: Library, dtype: str) -> None:
    """As the leaky ReLU of its slope; a slope of 0 makes exactly +0, and slopes are rounded."""
    patterns = oracle.patterns(dtype)
    x = array_of(library, patterns, dtype)
    for member in _SLOPES:
        weight = _weight(library, oracle.MEMBERS[member].get("negative_slope", 0.0))
        check(library, relu_xp.prelu(x, weight, axis=0), oracle.forward(dtype, member), patterns)
        y, pullback = relu_xp.prelu_vjp(x, weight, axis=0)
        check(library, y, oracle.forward(dtype, member), patterns)
        for other in library.dtypes:
            gradients = oracle.gradients(other, patterns.size)
            dx, _ = pullback(array_of(library, gradients, other))
            check(library, dx, oracle.backward(dtype, other, member), gradients, patterns)


def test_prelus_weight_counts_what_is_not_above_0(library: Library, dtype: str) -> None:
    """Neither a NaN nor an infinity gets in from above, of x or of dy."""
    x = np.array([[np.nan, np.inf, 3.0, -2.0, -0.0, 1.0]], oracle.DTYPES[dtype])
    dy = np.array([[np.nan, np.nan, np.inf, 0.5, 7.0, -np.inf]], oracle.DTYPES[dtype])
    for slope in (0.25, 0.0):
        _, pullback = relu_xp.prelu_vjp(library.array(x), _weight(library, slope))
        dx, dweight = pullback(library.array(dy))
        assert library.numpy(dweight).tolist() == [-1.0]
        expected = [[np.nan, np.nan, np.inf, 0.5 * slope, 7.0 * slope, -np.inf]]
        np.testing.assert_array_equal(library.numpy(dx).astype(np.float64), expected)


def test_rrelu_obeys_the_table(library: Library, dtype: str) -> None:
    """With equal bounds it is leaky, in evaluation and in training, whatever is drawn."""
    patterns = oracle.patterns(dtype)
    x = array_of(library, patterns, dtype)
    gradients = oracle.gradients(dtype, patterns.size)
    dy = array_of(library, gradients, dtype)
    for member in ("relu", "leaky"):
        slope = oracle.MEMBERS[member].get("negative_slope", 0.0)
        for rng in (None, np.random.default_rng(0)):
            if rng is not None and dtype != "float64":  # it draws in float32
                slope = float(np.float32(slope))
            y, pullback = relu_xp.rrelu_vjp(x, slope, slope, rng=rng)
            again = relu_xp.rrelu(x, slope, slope, rng=rng)
            for result in (y, again):
                check(library, result, oracle.forward(dtype, member), patterns)
            check(library, pullback(dy), oracle.backward(dtype, dtype, member), gradients, patterns)


def test_crelu_obeys_the_table(library: Library, dtype: str) -> None:
    """ReLU of x and of -x; the gradient of one, minus that of the other."""
    form, patterns = oracle.Format(dtype), oracle.patterns(dtype)
    x = array_of(library, patterns, dtype)
    relu = oracle.members(dtype)["relu"]
    opposite = patterns ^ form.unsigned.type(form.sign)
    both = [relu.forward(bits) for bits in (*patterns.tolist(), *opposite.tolist())]
    y, pullback = relu_xp.crelu_vjp(x, axis=0)
    for result in (y, relu_xp.crelu(x, axis=0)):
        check(library, result, oracle.Expected(form, both), np.concatenate([patterns, patterns]))
    above = [relu.piece(bits) for bits in patterns.tolist()]
    below = [relu.piece(bits) for bits in opposite.tolist()]
    for other in library.dtypes:
        its_form, dy = oracle.Format(other), oracle.gradients(other, 2 * patterns.size)
        first, second = dy[: patterns.size], dy[patterns.size :]
        minus = second ^ its_form.unsigned.type(its_form.sign)
        # A library's own negation may change a NaN, as its difference may, which a NaN x takes.
        nan = oracle.is_nan(its_form, minus).tolist()
        expected = [
            0 if not up and not down else a if not down else oracle.ANY_NAN if up or lost else b
            for up, down, a, b, lost in zip(
                above, below, first.tolist(), minus.tolist(), nan, strict=True
            )
        ]
        dx = library.numpy(pullback(array_of(library, dy, other))).copy()
        dx[oracle.is_nan(form, patterns)] = np.nan  # the test below has the difference
        oracle.Expected(its_form, expected).check(
            dx, first, second, patterns, subnormals=library.subnormals, payloads=library.payloads
        )


def test_crelus_gradient_at_nan_is_the_difference(library: Library, dtype: str) -> None:
    """And +0 at both zeros."""
    x = library.array(np.array([np.nan, -np.nan, 2, -2, 0, -0.0], oracle.DTYPES[dtype]))
    dy = [5, -1, 5, 5, np.nan, 5, 1.5, 3, 1.5, 1.5, 1, np.inf]
    _, pullback = relu_xp.crelu_vjp(x, axis=0)
    dx = library.numpy(pullback(library.array(np.array(dy, oracle.DTYPES[dtype]))))
    np.testing.assert_array_equal(dx.astype(np.float64), [3.5, -4, 5, -1.5, 0, 0])
    assert not np.signbit(dx[4:]).any()


def test_squared_relu_obeys_the_table(library: Library, dtype: str) -> None:
    """x*x and 2*x*dy above 0, rounded once, +0 elsewhere."""
    form, patterns = oracle.Format(dtype), oracle.patterns(dtype)
    relu = oracle.members(dtype)["relu"]
    x = array_of(library, patterns, dtype)
    squares = [form.product(bits, bits) if relu.piece(bits) else 0 for bits in patterns.tolist()]
    y, pullback = relu_xp.squared_relu_vjp(x)
    for result in (y, relu_xp.squared_relu(x)):
        check(library, result, oracle.Expected(form, squares), patterns)
    dy = oracle.gradients(dtype, patterns.size)
    expected = [
        _twice_product(form, left, right) if relu.piece(left) else 0
        for left, right in zip(patterns.tolist(), dy.tolist(), strict=True)
    ]
    dx = pullback(array_of(library, dy, dtype))
    check(library, dx, oracle.Expected(form, expected), dy, patterns)


_SLOPES = ("relu", "leaky", "steep", "tiny-slope")  # members that a negative slope alone describes


def _weight(library: Library, slope: float) -> Any:
    return library.array(np.full(1, slope, oracle.DTYPES[library.dtypes[-1]]))


def _twice_product(form: oracle.Format, left: int, right: int) -> int | None:
    """Return the bits of 2*x*dy, rounded once; but 2*x may overflow, where float32 would too."""
    value, other = form.value(left), form.value(right)
    finite = form.infinity not in (left, right & (form.sign - 1))
    if value is not None and other is not None and finite and form.dtype == np.float16:
        return form.encode((left ^ right) & form.sign, 2 * abs(value * other), form.unit_shift)
    if value is not None and left != form.infinity:
        left = form.encode(left & form.sign, 2 * abs(value), 0)
    return form.product(left, right)


def test_rows_by_hand(library: Library, dtype: str) -> None:
    """The table's rows as a reader would type them, in case the oracle shares a mistake."""
    numpy_dtype = oracle.DTYPES[dtype]
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -1.5, -0.0, 0.0, 0.5, 6.0, 7.0, inf, nan], numpy_dtype)
    dy = np.array([nan, inf, -inf, nan, -2.0, 3.0, nan, 1.0, 5.0], numpy_dtype)

    def same(result: Any, expected: list[float]) -> None:
        row = [float(v) for v in library.numpy(result)]
        np.testing.assert_array_equal(row, expected)
        np.testing.assert_array_equal(np.signbit(row)[:8], np.signbit(expected)[:8])

    def mine() -> Any:
        return library.array(x)

    same(relu_xp.relu(mine()), [0, 0, 0, 0, 0.5, 6, 7, inf, nan])
    same(relu_xp.relu6(mine()), [0, 0, 0, 0, 0.5, 6, 6, 6, nan])
    same(relu_xp.leaky_relu(mine(), 0.5), [-inf, -0.75, -0.0, 0, 0.5, 6, 7, inf, nan])
    same(relu_xp.thresholded_relu(mine(), 0.5), [0, 0, 0, 0, 0, 6, 7, inf, nan])
    same(relu_xp.clipped_relu(mine(), 0.25), [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25, nan])
    same(relu_xp.relu_grad(mine()), [0, 0, 0, 0, 1, 1, 1, 1, 1])
    same(relu_xp.relu_grad(mine(), max_value=6), [0, 0, 0, 0, 1, 0, 0, 0, 1])
    same(relu_xp.relu_backward(library.array(dy), mine()), [0, 0, 0, 0, -2, 3, nan, 1, 5])


def test_a_long_array_agrees_with_a_short_one(library: Library, dtype: str) -> None:
    """Blocks, tails and vector loops: the same bits at every length and place."""
    short = oracle.specials(dtype)
    for member in ("relu", "everything"):
        numbers = oracle.MEMBERS[member]
        y = library.numpy(relu_xp.relu(array_of(library, short, dtype), **numbers))
        long = np.tile(short, -(-150_001 // short.size))[:150_001]
        x = array_of(library, long, dtype)
        z, pullback = relu_xp.relu_vjp(x, **numbers)
        dy = array_of(library, oracle.gradients(dtype, long.size), dtype)
        dx = library.numpy(pullback(dy))
        again = library.numpy(relu_xp.relu_backward(dy, x, **numbers))
        np.testing.assert_array_equal(
            _canonical(library.numpy(z), numbers), np.resize(_canonical(y, numbers), long.size)
        )
        np.testing.assert_array_equal(_canonical(dx, numbers), _canonical(again, numbers))


def _canonical(x: _Host, numbers: dict[str, Any]) -> _Host:
    """Return the bits of an array; every NaN the same one, where a product may have made it."""
    form = oracle.Format(x.dtype.name)
    bits = x.view(form.unsigned)
    return np.where(oracle.is_nan(form, bits), form.sign - 1, bits) if numbers else bits


@pytest.mark.parametrize("kind", ["int8", "int32", "int64", "uint8"])
def test_integers_go_forward_only(library: Library, kind: str) -> None:
    """D1: their dtype is kept, numbers must fit it, and there is no gradient."""
    host = np.array([-3, 0, 2, 9] if kind[0] == "i" else [0, 1, 2, 9], kind)
    x, y = library.array(host), library.array(np.ones(4, library.dtypes[0]))
    if library.numpy(x).dtype != kind:
        pytest.skip(f"{library.name} has no {kind}")  # JAX, as it is by default
    for numbers, wanted in (
        ({}, np.maximum(host, 0)),
        ({"max_value": 5, "threshold": 1}, np.where(host <= 1, 0, np.minimum(host, 5))),
    ):
        got = library.numpy(relu_xp.relu(x, **numbers))
        assert got.dtype == kind
        np.testing.assert_array_equal(got, wanted)
    with pytest.raises(ValueError, match=r"negative_slope=0\.5 is not a whole number that"):
        relu_xp.relu(x, negative_slope=0.5)
    for call in (relu_xp.relu_grad, relu_xp.relu_vjp, relu_xp.ReLU().forward):
        with pytest.raises(TypeError, match="which has no gradient"):
            call(x)
    for dy, of in ((x, y), (y, x)):
        with pytest.raises(TypeError, match="which has no gradient"):
            relu_xp.relu_backward(dy, of)
    with pytest.raises(TypeError, match=r"pullback: dy has dtype .*, which has no gradient"):
        relu_xp.relu_vjp(y)[1](x)


@pytest.mark.parametrize("kind", ["bool", "complex64"])
def test_dtypes_without_order_are_refused(library: Library, kind: str) -> None:
    """D1, with the argument's name."""
    x = library.array(np.ones(2, kind))
    for call in (relu_xp.relu, relu_xp.relu_grad, relu_xp.relu_vjp):
        with pytest.raises(TypeError, match=f"^{call.__name__}: x: .*{kind}"):
            call(x)


def test_what_does_not_fit_is_refused(library: Library, dtype: str) -> None:
    """Another shape: ValueError. Another library, or no array at all: TypeError."""
    host = np.ones((3, 2), oracle.DTYPES[dtype])
    x, other = library.array(host), library.array(host[:2])
    foreign: Any = host.tolist() if isinstance(x, np.ndarray) else host
    _, pullback = relu_xp.relu_vjp(x)
    layer = relu_xp.ReLU()
    layer.forward(x)
    for dy, error in ((other, ValueError), (foreign, TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"^pullback: .*dy "):
            pullback(dy)
        with pytest.raises(error, match=r"^backward: .*dy "):
            layer.backward(dy)
        with pytest.raises(error, match=r"^relu_backward: .*dy "):
            relu_xp.relu_backward(dy, x)
    np.testing.assert_array_equal(library.numpy(layer.backward(x)), host, "the mask is still there")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)], ids=str)
@_each_kind
def test_0d_and_empty_arrays_stay_arrays(
    library: Library, dtype: str, shape: tuple[int, ...], numbers: dict[str, Any]
) -> None:
    """A1: with their dtype, as every result has."""
    host = np.full(shape, -2.5, oracle.DTYPES[dtype])
    x, dy = library.array(host), library.array(np.ones(shape, host.dtype))
    y, pullback = relu_xp.relu_vjp(x, **numbers)
    results = {
        "relu_vjp": y,
        "relu": relu_xp.relu(x, **numbers),
        "relu_grad": relu_xp.relu_grad(x, **numbers),
        "relu_backward": relu_xp.relu_backward(dy, x, **numbers),
        "pullback": pullback(dy),
    }
    for name, result in results.items():  # `library.numpy` asserts the type
        got = library.numpy(result)
        assert (got.shape, got.dtype) == (shape, host.dtype), name
    assert (pullback.saved_nbytes > 0) == (host.size > 0)


@_each_kind
def test_every_layout(library: Library, dtype: str, numbers: dict[str, Any]) -> None:
    """A1: views of an array, and x and dy in different layouts."""
    rng = np.random.default_rng(7)
    host, gradient = rng.standard_normal((2, 24, 24)).astype(oracle.DTYPES[dtype])
    of_x = list(_views(library.array(host), host))
    of_dy = list(_views(library.array(gradient), gradient))
    assert len(of_x) == len(of_dy) > 0
    for (x, seen), (dy, back) in zip(of_x, of_dy[1:] + of_dy[:1], strict=True):
        flat = library.array(seen.ravel())
        wanted = library.numpy(relu_xp.relu(flat, **numbers)).reshape(seen.shape)
        slope = library.numpy(
            relu_xp.relu_backward(library.array(back.ravel()), flat, **numbers)
        ).reshape(seen.shape)
        y, pullback = relu_xp.relu_vjp(x, **numbers)
        np.testing.assert_array_equal(library.numpy(y), wanted)
        np.testing.assert_array_equal(library.numpy(relu_xp.relu(x, **numbers)), wanted)
        np.testing.assert_array_equal(library.numpy(pullback(dy)), slope)
        np.testing.assert_array_equal(library.numpy(relu_xp.relu_backward(dy, x, **numbers)), slope)


def _views(x: Any, host: _Host) -> Iterator[tuple[Any, _Host]]:
    """Return those (12, 12) views of a (24, 24) array that the library has, and the host's."""
    xp = array_api_compat.array_namespace(x)
    for part in (np.s_[:12, :12], np.s_[1::2, ::2], np.s_[11::-1, ::-2]):
        with contextlib.suppress(Exception):  # PyTorch has no negative steps
            yield x[part], host[part]
    yield xp.permute_dims(x[:12, 12:], (1, 0)), host[:12, 12:].T


@_each_kind
def test_broadcast_gradients(library: Library, dtype: str, numbers: dict[str, Any]) -> None:
    """A1: the gradient of a sum, over all axes or one."""
    host = np.linspace(-3, 3, 35, dtype=np.float32).reshape(5, 7).astype(oracle.DTYPES[dtype])
    x = library.array(host)
    xp = array_api_compat.array_namespace(x)
    _, pullback = relu_xp.relu_vjp(x, **numbers)
    for shape in ((), (7,), (5, 1)):
        small = np.full(shape, 3, host.dtype)
        whole = library.array(np.broadcast_to(small, host.shape))
        wanted = library.numpy(relu_xp.relu_backward(whole, x, **numbers))
        dy = xp.broadcast_to(library.array(small), host.shape)
        np.testing.assert_array_equal(library.numpy(pullback(dy)), wanted)
        np.testing.assert_array_equal(
            library.numpy(relu_xp.relu_backward(dy, x, **numbers)), wanted
        )


@_each_kind
def test_nothing_is_written(library: Library, dtype: str, numbers: dict[str, Any]) -> None:
    """A2: neither x nor dy."""
    host = np.array([-2.0, -0.0, 0.5, 1.0, 4.0, np.nan], oracle.DTYPES[dtype])
    x, dy = library.array(host), library.array(host[::-1])
    layer = relu_xp.ReLU(**numbers)
    layer.forward(x)
    layer.backward(dy)
    relu_xp.relu(x, **numbers)
    relu_xp.relu_grad(x, **numbers)
    relu_xp.relu_backward(dy, x, **numbers)
    assert library.numpy(x).tobytes() == host.tobytes(), "x was written"
    assert library.numpy(dy).tobytes() == host[::-1].tobytes(), "dy was written"


@_each_kind
def test_what_is_saved_is_ours_alone(library: Library, dtype: str, numbers: dict[str, Any]) -> None:
    """A3: overwriting x and y after forward changes no gradient."""
    host = np.array([-1.0, 2.0, 0.0, 5.0, 0.75] * 40, oracle.DTYPES[dtype])
    x, dy = library.array(host), library.array(np.ones_like(host))
    wanted = library.numpy(relu_xp.relu_grad(x, **numbers)).copy()
    y, pullback = relu_xp.relu_vjp(x, **numbers)
    assert pullback.saved_nbytes > 0
    for mine in (x, y):
        with contextlib.suppress(TypeError):  # of a library whose arrays cannot be written
            relu_xp.relu(library.array(7 - host), out=mine)
    for _ in range(2):
        np.testing.assert_array_equal(library.numpy(pullback(dy)), wanted)


@_each_kind
def test_out_is_written_or_refused(library: Library, dtype: str, numbers: dict[str, Any]) -> None:
    """A4: what is written is `out`, the very input too; or nothing is, and a TypeError says so."""
    rng = np.random.default_rng(4)
    host, gradient = (2 * rng.standard_normal((2, 200))).astype(oracle.DTYPES[dtype])
    y = library.numpy(relu_xp.relu(library.array(host.copy()), **numbers)).copy()
    g = library.numpy(relu_xp.relu_grad(library.array(host.copy()), **numbers)).copy()
    dx = library.numpy(
        relu_xp.relu_backward(library.array(gradient.copy()), library.array(host.copy()), **numbers)
    ).copy()

    def fresh() -> Any:
        return library.array(np.full_like(host, 77.0))

    x, dy = library.array(host.copy()), library.array(gradient.copy())
    layer = relu_xp.ReLU(**numbers)
    layer.inplace = True
    try:
        relu_xp.relu(x, **numbers, out=fresh())
    except TypeError:
        for out in (fresh(), x):
            for call in (relu_xp.relu, relu_xp.relu_grad, relu_xp.relu_vjp):
                with pytest.raises(TypeError, match="cannot be written"):
                    call(x, **numbers, out=out)
        with pytest.raises(TypeError, match="cannot be written"):
            layer.forward(x)
        np.testing.assert_array_equal(library.numpy(x), host)
        return

    def inputs_and_outs() -> list[tuple[Any, Any]]:
        itself = library.array(host.copy())
        return [(x, fresh()), (itself, itself)]

    def check(result: Any, out: Any, wanted: _Host) -> None:
        assert result is out
        np.testing.assert_array_equal(library.numpy(out), wanted)

    for call, wanted in ((relu_xp.relu, y), (relu_xp.relu_grad, g)):
        for mine, out in inputs_and_outs():
            check(call(mine, **numbers, out=out), out, wanted)
    for mine, out in inputs_and_outs():
        result, pullback = relu_xp.relu_vjp(mine, **numbers, out=out)
        check(result, out, y)
        into = fresh()
        check(pullback(dy, out=into), into, dx)
        into = library.array(gradient.copy())
        check(pullback(into, out=into), into, dx)
    into = library.array(gradient.copy())
    check(relu_xp.relu_backward(into, x, **numbers, out=into), into, dx)
    into = library.array(host.copy())
    check(relu_xp.relu_backward(dy, into, **numbers, out=into), into, dx)
    mine, back = library.array(host.copy()), library.array(gradient.copy())
    check(layer.forward(mine), mine, y)
    check(layer.backward(back), back, dx)
    np.testing.assert_array_equal(library.numpy(x), host)
    np.testing.assert_array_equal(library.numpy(dy), gradient)


def _variant(library: Library, name: str, x: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Return y of a variant, its pullback, and a function that returns the gradient by x."""
    if name == "prelu":
        y, pullback = relu_xp.prelu_vjp(x, _weight(library, 0.25), axis=0, **options)
    elif name == "rrelu":
        y, pullback = relu_xp.rrelu_vjp(x, rng=np.random.default_rng(2), **options)
    elif name == "crelu":
        y, pullback = relu_xp.crelu_vjp(x, axis=0, **options)
    else:
        y, pullback = relu_xp.squared_relu_vjp(x, **options)

    def backward(dy: Any, **options: Any) -> Any:
        result = pullback(dy, **options)
        return result[0] if name == "prelu" else result

    return y, pullback, backward


_each_variant = pytest.mark.parametrize("name", ["prelu", "rrelu", "crelu", "squared_relu"])


@_each_variant
def test_a_variants_arrays_stay_arrays(library: Library, dtype: str, name: str) -> None:
    """A1, D2: 0-d and empty ones too, and dy's dtype is that of its gradient."""
    for shape in ((), (0,), (1,), (2, 3), (3, 0, 2)):
        if name == "crelu" and not shape:
            continue  # there is no axis to concatenate along
        x = library.array(np.full(shape, -2.0, oracle.DTYPES[dtype]))
        y, pullback, backward = _variant(library, name, x)
        assert library.numpy(y).dtype == oracle.DTYPES[dtype]
        for other in library.dtypes:
            dx = library.numpy(backward(library.array(np.ones(y.shape, oracle.DTYPES[other]))))
            assert (dx.shape, dx.dtype) == (shape, oracle.DTYPES[other])
        if 0 not in shape:
            assert pullback.saved_nbytes > 0


@_each_variant
def test_a_variant_keeps_and_writes_nothing_of_the_callers(
    library: Library, dtype: str, name: str
) -> None:
    """A2, A3: overwriting x and y after forward changes no gradient."""
    host = np.array([-1.0, 2.0, -0.0, 5.0, -0.75, 0.5] * 40, oracle.DTYPES[dtype])
    x = library.array(host.copy())
    y, _, backward = _variant(library, name, x)
    gradient = np.cos(np.arange(y.shape[0])).astype(oracle.DTYPES[dtype])
    dy = library.array(gradient.copy())
    wanted = library.numpy(backward(dy)).copy()
    assert library.numpy(x).tobytes() == host.tobytes(), "x was written"
    assert library.numpy(dy).tobytes() == gradient.tobytes(), "dy was written"
    for mine in (x, y):
        with contextlib.suppress(TypeError):  # of a library whose arrays cannot be written
            relu_xp.relu(library.array(np.full(mine.shape, 7, host.dtype)), out=mine)
    for _ in range(2):
        np.testing.assert_array_equal(library.numpy(backward(dy)), wanted)


@_each_variant
def test_a_variants_out_is_written_or_refused(library: Library, dtype: str, name: str) -> None:
    """A4: `out` is another array, or the very input where that has the shape."""
    host = np.linspace(-3, 3, 150).astype(oracle.DTYPES[dtype])
    x = library.array(host.copy())
    y, _, backward = _variant(library, name, x)
    wanted = library.numpy(y).copy()
    gradient = np.cos(np.arange(wanted.size)).astype(oracle.DTYPES[dtype])
    wanted_dx = library.numpy(backward(library.array(gradient.copy()))).copy()

    def fresh(size: int) -> Any:
        return library.array(np.full(size, 77, host.dtype))

    try:
        _variant(library, name, x, out=fresh(wanted.size))
    except TypeError:
        with pytest.raises(TypeError, match="cannot be written"):
            backward(library.array(gradient), out=fresh(host.size))
        return
    itself, dy = library.array(host.copy()), library.array(gradient.copy())
    pairs = [(x, fresh(wanted.size), library.array(gradient.copy()), fresh(host.size))]
    if wanted.shape == host.shape:
        pairs.append((itself, itself, dy, dy))
    for mine, out, back, into in pairs:
        y, _, backward = _variant(library, name, mine, out=out)
        assert y is out
        np.testing.assert_array_equal(library.numpy(y), wanted)
        dx = backward(back, out=into)
        assert dx is into
        np.testing.assert_array_equal(library.numpy(dx), wanted_dx)


def test_an_out_that_does_not_fit_is_refused(library: Library) -> None:
    """A4: another shape, dtype, library; memory that overlaps an input otherwise than as it."""
    dtype, other = library.dtypes[0], library.dtypes[-1]
    host = np.arange(-4.0, 4.0).astype(oracle.DTYPES[dtype])
    x = library.array(host)
    with pytest.raises(TypeError, match="relu: out must be an array, got list"):
        relu_xp.relu(x, out=host.tolist())
    with pytest.raises(ValueError, match=r"relu: out has shape \(3,\), x is \(8,\)"):
        relu_xp.relu(x, out=library.array(host[:3]))
    if other != dtype:
        with pytest.raises(TypeError, match=f"relu: out has dtype .*{other}, the result .*{dtype}"):
            relu_xp.relu(x, out=library.array(host.astype(oracle.DTYPES[other])))
    memory = library.array(np.full(12, 5, host.dtype))
    try:
        relu_xp.relu(x, out=memory[4:])
    except TypeError:
        return  # cannot be written at all
    if (library.numpy(memory)[4:] == 5).all():
        return  # a slice is a copy
    for call in (relu_xp.relu, relu_xp.relu_grad, relu_xp.relu_vjp):
        with pytest.raises(ValueError, match="out overlaps an input without being the same"):
            call(memory[:8], out=memory[4:])
    with pytest.raises(ValueError, match="out overlaps an input without being the same"):
        relu_xp.relu_backward(x, memory[:8], out=memory[4:])


def test_a_mask_of_the_callers(library: Library, dtype: str) -> None:
    """Filled and read, nothing behind it written; or refused, where the library makes its own."""
    host = np.linspace(-4, 4, 77).astype(oracle.DTYPES[dtype])
    x, dy = library.array(host), library.array(host + 9)
    for numbers in ({}, {"negative_slope": 0.5, "max_value": 2.0}):
        y, pullback = relu_xp.relu_vjp(x, **numbers)
        backend = backend_for("test", "x", x)
        nbytes = backend.mask_nbytes(Rounded(Activation(**numbers), dtype), x)
        mask = library.array(np.full(100 if nbytes is None else nbytes + 20, 0x5A, np.uint8))
        if nbytes is None:
            with pytest.raises(TypeError, match="relu_vjp: mask was given, but x is"):
                relu_xp.relu_vjp(x, **numbers, mask=mask)
            continue
        again, masked = relu_xp.relu_vjp(x, **numbers, mask=mask)
        np.testing.assert_array_equal(library.numpy(again), library.numpy(y))
        np.testing.assert_array_equal(library.numpy(masked(dy)), library.numpy(pullback(dy)))
        assert nbytes <= masked.saved_nbytes <= nbytes + 7
        assert (library.numpy(mask)[masked.saved_nbytes :] == 0x5A).all()


@pytest.mark.parametrize(
    "layer",
    [
        relu_xp.ReLU(),
        relu_xp.LeakyReLU(0.25),
        relu_xp.ReLU6(),
        relu_xp.ClippedReLU(3.0, threshold=-1.0),
        relu_xp.ThresholdedReLU(2.0, positive_slope=0.5),
        relu_xp.ReLU(negative_slope=0.1, threshold=0.5, positive_slope=2.0, max_value=6.0),
    ],
    ids=repr,
)
def test_a_layer_is_its_functions(library: Library, dtype: str, layer: relu_xp.ReLU) -> None:
    """And holds what it saved from forward to backward."""
    host = np.linspace(-4, 8, 240).reshape(12, 20).astype(oracle.DTYPES[dtype])
    x, dy = library.array(host), library.array(np.cos(host))
    a = layer.activation
    numbers: dict[str, Any] = {
        "negative_slope": a.negative_slope,
        "threshold": a.threshold,
        "positive_slope": a.positive_slope,
        "max_value": a.max_value,
    }
    y = library.numpy(relu_xp.relu(x, **numbers))
    dx = library.numpy(relu_xp.relu_backward(dy, x, **numbers))
    np.testing.assert_array_equal(library.numpy(layer.forward(x, training=False)), y)
    assert layer.saved_nbytes == 0
    np.testing.assert_array_equal(library.numpy(layer(x)), y)
    assert layer.saved_nbytes > 0
    np.testing.assert_array_equal(library.numpy(layer.backward(dy, retain=True)), dx)
    np.testing.assert_array_equal(library.numpy(layer.backward(dy)), dx)
    assert layer.saved_nbytes == 0
    with pytest.raises(RuntimeError, match="backward: nothing is saved"):
        layer.backward(dy)


def test_the_backend_has_the_protocol(library: Library, dtype: str) -> None:
    """Every function of `relu_xp.backends.Backend`, by its signature, and those that describe."""
    x = library.array(np.ones(3, oracle.DTYPES[dtype]))
    backend = backend_for("test", "x", x)
    check_signatures(backend)
    assert backend.dtype_name(x.dtype) == dtype
    place = backend.place(x)
    assert place == backend.place(library.array(np.ones(5, oracle.DTYPES[dtype])))
    assert isinstance(place[0], str)
    hash(place)
    assert not backend.fits(None, x, x)
    assert not backend.fits(library.array(np.ones(4, oracle.DTYPES[dtype])), x, x)


def check_signatures(backend: Any) -> None:
    """Raise AssertionError unless a backend's functions have the protocol's signatures."""
    for name, function in vars(Backend).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            wanted = list(inspect.signature(function).parameters.values())[1:]
            assert callable(getattr(backend, name, None)), f"there is no function {name}"
            got = list(inspect.signature(getattr(backend, name)).parameters.values())
            assert [(p.name, p.kind, p.default) for p in got] == [
                (p.name, p.kind, p.default) for p in wanted
            ], f"{name} has other parameters than relu_xp.backends.Backend.{name}"


# For who runs the suite over libraries of his own, with fixtures `library` and `dtype` of his own.
__all__ = [name for name in dir() if name.startswith("test_")]
