"""The rules that every backend has to obey, as tests, to the bit.

The author of a backend runs, with its package installed::

    pytest -p relu_xp.testing --pyargs relu_xp.testing.conformance --xp NAME

for the library NAME, any that `relu_xp.dispatch.namespace` imports: all floating dtypes that it can
exchange with NumPy, against a reference that computes with integers. Where a library's own
operations flush subnormals or change the payload of a NaN, which the suite finds out, rules F2 and
F4 are tested as far as it keeps them.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

import relu_xp
from relu_xp.backends.base import Backend
from relu_xp.dispatch import backend_for
from relu_xp.testing import reference
from relu_xp.testing._activations import RELU, VJPS, dx_of, views
from relu_xp.testing._library import Bits, Library, array_of, check, library_of

try:
    import pytest
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "relu_xp.testing.conformance needs pytest: pip install pytest", name="pytest"
    ) from None

from relu_xp.testing._bias_relu import *  # noqa: F403
from relu_xp.testing._truth_table import *  # noqa: F403

_each_relu = pytest.mark.parametrize("params", RELU.values(), ids=RELU)
_each_activation = pytest.mark.parametrize("name", VJPS)

# A library may warn when a product overflows, or at a signalling NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")


@pytest.fixture
def library(xp: Any) -> Library:
    """Return the library under test."""
    return library_of(xp)


@pytest.fixture(params=reference.DTYPES)
def dtype(request: pytest.FixtureRequest, library: Library) -> str:
    """Return one of its floating dtypes."""
    name: str = request.param
    if name not in library.dtypes:
        pytest.skip(f"{library.name} has no {name} that NumPy takes")
    return name


@pytest.mark.parametrize("kind", ["int8", "int32", "int64", "uint8"])
def test_integers_have_a_forward_pass_only(library: Library, kind: str) -> None:
    """D1: their dtype is kept, parameters must fit it, and there is no gradient."""
    host = np.array([-3, 0, 2, 9] if kind[0] == "i" else [0, 1, 2, 9], kind)
    x, floating = library.array(host), library.array(np.ones(4, library.dtypes[0]))
    if library.numpy(x).dtype != kind:
        pytest.skip(f"{library.name} has no {kind}")  # JAX, by default
    for params, expected in (
        ({}, np.maximum(host, 0)),
        ({"max_value": 5, "threshold": 1}, np.where(host <= 1, 0, np.minimum(host, 5))),
    ):
        got = library.numpy(relu_xp.relu(x, **params))
        assert got.dtype == kind
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match=r"negative_slope=0\.5 is not an integer that"):
        relu_xp.relu(x, negative_slope=0.5)
    for call, arguments in (
        *((call, (x,)) for call in (relu_xp.relu_grad, relu_xp.relu_vjp, relu_xp.ReLU().forward)),
        *((relu_xp.relu_backward, pair) for pair in ((x, floating), (floating, x))),
        (relu_xp.relu_vjp(floating)[1], (x,)),
    ):
        with pytest.raises(TypeError, match=r"has dtype .*, which has no gradient"):
            call(*arguments)


@pytest.mark.parametrize("kind", ["bool", "complex64"])
def test_unsupported_dtypes_are_refused(library: Library, kind: str) -> None:
    """D1, with the argument's name."""
    x = library.array(np.ones(2, kind))
    for call in (relu_xp.relu, relu_xp.relu_grad, relu_xp.relu_vjp):
        with pytest.raises(TypeError, match=f"^{call.__name__}: x: .*{kind}"):
            call(x)


def test_an_invalid_dy_is_refused(library: Library, dtype: str) -> None:
    """Another shape: ValueError. Another library, or no array: TypeError."""
    host = np.ones((3, 2), reference.DTYPES[dtype])
    x, other = library.array(host), library.array(host[:2])
    foreign: Any = host.tolist() if isinstance(x, np.ndarray) else host
    layer, (_, pullback) = relu_xp.ReLU(), relu_xp.relu_vjp(x)
    layer.forward(x)
    for dy, error in ((other, ValueError), (foreign, TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"^pullback: .*dy "):
            pullback(dy)
        with pytest.raises(error, match=r"^backward: .*dy "):
            layer.backward(dy)
        with pytest.raises(error, match=r"^relu_backward: .*dy "):
            relu_xp.relu_backward(dy, x)
    np.testing.assert_array_equal(library.numpy(layer.backward(x)), host, "the mask was lost")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3)], ids=str)
@_each_activation
def test_shapes_and_dtypes_are_kept(
    library: Library, dtype: str, name: str, shape: tuple[int, ...]
) -> None:
    """A1, D2: 0-d and empty arrays too; the dtype of a gradient is that of dy."""
    if not shape and name.startswith(("crelu", "bias_relu")):
        return  # there is no axis
    x = library.array(np.full(shape, -2.5, reference.DTYPES[dtype]))
    y, pullback = VJPS[name](x)
    results = [(y, dtype, tuple(y.shape))]
    for other in library.dtypes:
        dy = library.array(np.ones(y.shape, reference.DTYPES[other]))
        results.append((dx_of(pullback(dy)), other, shape))
        if name in RELU:
            results.append((relu_xp.relu_backward(dy, x, **RELU[name]), other, shape))
    if name in RELU:
        results += [(f(x, **RELU[name]), dtype, shape) for f in (relu_xp.relu, relu_xp.relu_grad)]
    for result, kind, its_shape in results:  # `library.numpy` asserts the type
        got = library.numpy(result)
        assert (got.shape, got.dtype) == (its_shape, reference.DTYPES[kind])
    assert y.shape == shape or name == "crelu"
    assert pullback.saved_nbytes > 0 or 0 in shape


@_each_relu
def test_every_layout(library: Library, dtype: str, params: dict[str, Any]) -> None:
    """A1: views, broadcast ones too (the gradient of a sum); x and dy in different layouts."""
    rng = np.random.default_rng(7)
    host, gradient = rng.standard_normal((2, 24, 24)).astype(reference.DTYPES[dtype])
    of_x = list(views(library.array(host), host))
    of_dy = list(views(library.array(gradient), gradient))
    for (x, seen), (dy, back) in zip(of_x, of_dy[1:] + of_dy[:1], strict=True):
        flat, flat_dy = library.array(seen.ravel()), library.array(back.ravel())
        expected = library.numpy(relu_xp.relu(flat, **params)).reshape(seen.shape)
        dx = library.numpy(relu_xp.relu_backward(flat_dy, flat, **params)).reshape(seen.shape)
        y, pullback = relu_xp.relu_vjp(x, **params)
        for result in (y, relu_xp.relu(x, **params)):
            np.testing.assert_array_equal(library.numpy(result), expected)
        for result in (pullback(dy), relu_xp.relu_backward(dy, x, **params)):
            np.testing.assert_array_equal(library.numpy(result), dx)


@_each_activation
def test_inputs_are_neither_written_nor_kept(library: Library, dtype: str, name: str) -> None:
    """A2, A3: overwriting x and y after forward changes no gradient."""
    host = np.array([-1.0, 2.0, -0.0, 5.0, 0.75, -0.5, np.nan] * 40, reference.DTYPES[dtype])
    x = library.array(host.copy())
    y, pullback = VJPS[name](x)
    gradient = np.cos(np.arange(y.shape[0])).astype(host.dtype)
    dy = library.array(gradient.copy())
    dx = library.numpy(dx_of(pullback(dy))).tobytes()
    for function in (relu_xp.relu, relu_xp.relu_grad, functools.partial(relu_xp.relu_backward, x)):
        function(x, **RELU.get(name, {}))
    assert library.numpy(x).tobytes() == host.tobytes(), "x was written"
    assert library.numpy(dy).tobytes() == gradient.tobytes(), "dy was written"
    for mine in (x, y):
        with contextlib.suppress(TypeError):  # of a library whose arrays cannot be written
            relu_xp.relu(library.array(np.full(mine.shape, 7, host.dtype)), out=mine)
    for _ in range(2):
        assert library.numpy(dx_of(pullback(dy))).tobytes() == dx, "x or y was kept"


@_each_activation
def test_out_is_written_or_refused(library: Library, dtype: str, name: str) -> None:
    """A4: `out` is another array or the very input. Immutable arrays are refused by TypeError."""
    host = np.linspace(-3, 3, 150).astype(reference.DTYPES[dtype])
    y, pullback = VJPS[name](library.array(host.copy()))
    gradient = np.cos(np.arange(y.shape[0])).astype(host.dtype)
    dx = library.numpy(dx_of(pullback(library.array(gradient.copy())))).copy()

    def forward(x: Any, **options: Any) -> Any:
        y, its_pullback = VJPS[name](x, **options)
        its_dx = dx_of(its_pullback(library.array(gradient.copy())))
        np.testing.assert_array_equal(library.numpy(its_dx), dx, "the mask is not that of x")
        return y

    calls: list[tuple[Callable[..., Any], list[Bits]]] = [
        (forward, [host]),
        (lambda dy, **options: dx_of(pullback(dy, **options)), [gradient]),
    ]
    if name in RELU:
        params = RELU[name]
        layer = relu_xp.ReLU(**params)

        def in_place(method: Callable[..., Any], x: Any, out: Any = None, **options: Any) -> Any:
            layer.inplace = out is x
            return method(x, out=None if out is x else out, **options)

        calls += [
            (functools.partial(relu_xp.relu, **params), [host]),
            (functools.partial(relu_xp.relu_grad, **params), [host]),
            (functools.partial(relu_xp.relu_backward, **params), [gradient, host]),
            (functools.partial(in_place, layer.forward), [host]),
            (functools.partial(in_place, layer.backward, retain=True), [gradient]),
        ]
    try:
        relu_xp.relu(library.array(host.copy()), out=library.array(host.copy()))
        writable = True
    except TypeError:
        writable = False
    for call, inputs in calls:
        result = call(*(library.array(one.copy()) for one in inputs))
        expected = library.numpy(result).copy()
        for target in (-1, *range(len(inputs))):
            arrays = [library.array(one.copy()) for one in inputs]
            out = library.array(np.full_like(expected, 77)) if target < 0 else arrays[target]
            if out.shape != expected.shape:
                continue
            if writable:
                assert call(*arrays, out=out) is out
                np.testing.assert_array_equal(library.numpy(out), expected)
            else:
                with pytest.raises(TypeError, match="cannot be written"):
                    call(*arrays, out=out)
            for array, before in zip(arrays, inputs, strict=True):
                if array is not out or not writable:
                    np.testing.assert_array_equal(library.numpy(array), before)


def test_an_invalid_out_is_refused(library: Library) -> None:
    """A4: another shape, dtype, library; memory that overlaps an input in another view."""
    dtype, other = library.dtypes[0], library.dtypes[-1]
    host = np.arange(-4.0, 4.0).astype(reference.DTYPES[dtype])
    x = library.array(host)
    try:
        relu_xp.relu(x, out=library.array(host.copy()))
    except TypeError:  # no array can be written, whatever else is wrong with it
        with pytest.raises(TypeError, match="relu: out cannot be written"):
            relu_xp.relu(x, out=host.tolist())
        return
    with pytest.raises(TypeError, match="relu: out must be an array, got list"):
        relu_xp.relu(x, out=host.tolist())
    with pytest.raises(ValueError, match=r"relu: out has shape \(3,\), x is \(8,\)"):
        relu_xp.relu(x, out=library.array(host[:3]))
    if other != dtype:
        with pytest.raises(TypeError, match=f"relu: out has dtype .*{other}, the result .*{dtype}"):
            relu_xp.relu(x, out=library.array(host.astype(reference.DTYPES[other])))
    memory = library.array(np.full(12, 5, host.dtype))
    relu_xp.relu(x, out=memory[4:])
    if (library.numpy(memory)[4:] == 5).all():
        return  # a slice is a copy
    for call in (relu_xp.relu, relu_xp.relu_grad, relu_xp.relu_vjp):
        with pytest.raises(ValueError, match="out overlaps an input without being the same"):
            call(memory[:8], out=memory[4:])
    with pytest.raises(ValueError, match="out overlaps an input without being the same"):
        relu_xp.relu_backward(x, memory[:8], out=memory[4:])


@_each_activation
def test_a_pullback_can_be_pickled(library: Library, name: str) -> None:
    """With its residuals, where the library's arrays can be."""
    x = library.array(np.linspace(-2, 2, 8, dtype=np.float32))
    try:
        pickle.dumps(x)
    except TypeError:
        pytest.skip(f"arrays of {library.name} cannot be pickled")
    y, pullback = VJPS[name](x)
    found, dx = (
        library.numpy(dx_of(p(y))) for p in (pickle.loads(pickle.dumps(pullback)), pullback)
    )
    np.testing.assert_array_equal(found, dx)


@_each_relu
def test_a_mask_of_the_caller(library: Library, dtype: str, params: dict[str, Any]) -> None:
    """It is filled and read, nothing behind it written; or refused by a library without masks."""
    host = np.linspace(-4, 4, 77).astype(reference.DTYPES[dtype])
    x, dy, bias = map(library.array, (host, host + 9, np.cos(host)))
    cast = relu_xp.ReLU(**params).activation.cast(dtype)
    nbytes = backend_for("test", "x", x).mask_nbytes(cast, x)
    for name, arrays in (("relu_vjp", (x,)), ("bias_relu_vjp", (x, bias))):
        vjp = functools.partial(getattr(relu_xp, name), *arrays, **params)
        mask = library.array(np.full(100 if nbytes is None else nbytes + 20, 0x5A, np.uint8))
        if nbytes is None:
            with pytest.raises(TypeError, match=f"^{name}: mask was given, but x is"):
                vjp(mask=mask)
            continue
        (y, pullback), (again, masked) = vjp(), vjp(mask=mask)
        pairs = (y, again), (dx_of(pullback(dy)), dx_of(masked(dy)))
        for result, other in pairs:
            np.testing.assert_array_equal(library.numpy(result), library.numpy(other))
        assert nbytes <= masked.saved_nbytes <= nbytes + 7
        assert (library.numpy(mask)[masked.saved_nbytes :] == 0x5A).all()


def test_the_backend_describes_arrays(library: Library, dtype: str) -> None:
    """Its class, and the methods that do not compute."""
    x, longer = (library.array(np.ones(n, reference.DTYPES[dtype])) for n in (3, 5))
    backend = backend_for("test", "x", x)
    assert isinstance(backend, Backend)
    assert backend.dtype_name(x.dtype) == dtype
    assert backend.device(x) == backend.device(longer)
    assert isinstance(backend.device(x)[0], str)
    hash(backend.device(x))
    assert not backend.is_valid_out(None, x, x)
    assert not backend.is_valid_out(longer, x, x)


# With ``import *``, for a suite that has fixtures `library` and `dtype` of its own.
__all__ = [name for name in dir() if name.startswith("test_")]
__all__ += ["array_of", "check"]
