"""What the conformance suite finds: the faults of a backend, and the limits of a library."""

from __future__ import annotations

import itertools
import pickle

import pytest
from libraries import LIBRARIES

from relu_xp import dispatch, validation
from relu_xp.backends.base import Backend
from relu_xp.testing import conformance, reference

xp = pytest.importorskip("array_api_strict")
BASE = Backend()
CANNOT_PICKLE = AttributeError, pickle.PicklingError  # of a local function, by version of Python


def keep_input(self, params, x, out, mask):
    return BASE.forward(params, x, out), (params, x)


def from_input(self, grad_params, dy, residuals, out):
    return BASE.backward_from_input(residuals[0], grad_params, dy, residuals[1], out)


def mask_of_y(self, params, x, out, mask):
    y = BASE.forward(params, x, out)
    return y, BASE.branch_codes(params, x)


def pass_at_threshold(self, params, x):
    codes = BASE.branch_codes(params, x)
    return codes if params.num_branches == 3 else codes | (x == params.threshold)


def dtype_of_x(self, params, grad_params, dy, x, out):
    return xp.astype(BASE.backward_from_input(params, grad_params, dy, x, out), x.dtype)


def add_halves(self, dy, mask, axis, out):
    return BASE.crelu_backward(dy, xp.where(mask == 2, 1, mask), axis, out)


def forget_factor(self, dy, x, out):
    return BASE.squared_relu_backward(dy, x, out) / 2


def one_axis(self, dy, x, weight):
    first = next((axis for axis, length in enumerate(weight.shape) if length > 1), None)
    shape = tuple(n if axis == first else 1 for axis, n in enumerate(weight.shape))
    total = BASE.prelu_weight_grad(dy, x, xp.zeros(shape, dtype=weight.dtype))
    return xp.broadcast_to(total, weight.shape)


def add_after(self, params, x, bias, axis, out):
    return self._add_bias(BASE.forward(params, x, None), bias, axis)


def sum_in_float64(self, params, x, bias, axis, out):
    total = self._add_bias(xp.astype(x, xp.float64), bias, axis)
    return BASE.forward(params, xp.astype(total, x.dtype), out)


def mask_of_x(self, params, x, bias, axis, out, mask):
    return BASE.bias_relu(params, x, bias, axis, out), BASE.branch_codes(params, x)


def sum_of_dy(self, params, dy, residuals, axis, dtype, out):
    ones = xp.ones_like(residuals)
    dx, _ = BASE.bias_relu_backward(params, dy, residuals, axis, dtype, out)
    return dx, BASE.bias_relu_backward(params, dy, ones, axis, dtype, None)[1]


def sum_in_float32(self, params, dy, residuals, axis, dtype, out):
    dx = BASE.backward(params, dy, residuals, out)
    others = tuple(other for other in range(dx.ndim) if other != axis)
    total = xp.sum(xp.astype(dx, xp.float32), axis=others, dtype=xp.float32)
    return dx, xp.astype(total, dtype)


def other_axis(self, params, dy, residuals, axis, dtype, out):
    return BASE.bias_relu_backward(params, dy, residuals, dy.ndim - 1 - axis, dtype, out)


def keep_dtype(self, params, dy, residuals, axis, dtype, out):
    return BASE.bias_relu_backward(params, dy, residuals, axis, dy.dtype, out)


CALLS = itertools.count()


def another_order(self, params, dy, residuals, axis, dtype, out):
    dx, total = BASE.bias_relu_backward(params, dy, residuals, axis, xp.float64, out)
    return dx, xp.astype(total * (1 + 2.0**-23 * (next(CALLS) % 2)), dtype)


def keep_function(self, params, x, out, mask):
    y, codes = BASE.forward_with_mask(params, x, out, mask)
    return y, lambda: codes


def call_function(self, grad_params, dy, residuals, out):
    return BASE.backward(grad_params, dy, residuals(), out)


def fault(test, **methods):
    """Return the name of the test that fails, and the methods of a backend with the fault."""
    return test, methods


RELU, KEPT = "relu_obeys_the_table", "inputs_are_neither_written_nor_kept"
BIAS, DBIAS = "bias_relu_obeys_the_table", "bias_gradient_is_the_sum_along_the_other_axes"
FAULTS = {
    "parameters": fault(RELU, forward=lambda self, p, x, out: xp.where(x <= 0, 0, x)),
    "F2": fault(
        RELU, forward=lambda self, p, x, out: xp.where(xp.isnan(x), 0, BASE.forward(p, x, out))
    ),
    "F3": fault(RELU, forward=lambda self, p, x, out: xp.where(x == 0, x, BASE.forward(p, x, out))),
    "G1": fault(RELU, branch_codes=pass_at_threshold),
    "G2": fault(
        RELU, branch_codes=lambda self, p, x: xp.where(x == x, BASE.branch_codes(p, x), x == x)
    ),
    "G3": fault(RELU, backward=lambda self, *args: BASE.backward(*args) + 0 * args[1]),
    "G4": fault(RELU, branch_codes=lambda self, p, x: ~(x <= p.threshold)),
    "D2": fault(RELU, backward_from_input=dtype_of_x),
    "A2": fault(KEPT, backward=lambda self, p, dy, codes, out: BASE.backward(p, dy, codes, dy)),
    "A3": fault(KEPT, forward_with_mask=keep_input, backward=from_input),
    "A3, squared ReLU": fault(KEPT, copy=lambda self, x: x),
    "A4, out": fault("out_is_written_or_refused", store=lambda self, result, out: result),
    "A4, mask": fault("out_is_written_or_refused", forward_with_mask=mask_of_y),
    "A4, overlap": fault("an_invalid_out_is_refused", check_out=lambda self, out, inputs: None),
    "valid out": fault("the_backend_describes_arrays", is_valid_out=lambda self, *arrays: True),
    "rows": fault("rows_by_hand", branch_codes=pass_at_threshold),
    "PReLU, weight": fault(
        "prelu_weight_gradient_sums_what_is_not_above_0",
        prelu_weight_grad=lambda self, dy, x, weight: xp.sum(x * dy, keepdims=True),
    ),
    "PReLU, axes": fault("prelu_weight_broadcasts", prelu_weight_grad=one_axis),
    "pickle": fault(
        "a_pullback_can_be_pickled", forward_with_mask=keep_function, backward=call_function
    ),
    "CReLU, sign": fault("crelu_obeys_the_table", crelu_backward=add_halves),
    "squared ReLU": fault("squared_relu_obeys_the_table", squared_relu_backward=forget_factor),
    "bias, added after": fault(BIAS, bias_relu=add_after),
    "bias, not rounded first": fault(BIAS, bias_relu=sum_in_float64),
    "bias, mask of x": fault(BIAS, bias_relu_with_mask=mask_of_x),
    "bias, rows by hand": fault("rows_of_bias_relu_by_hand", bias_relu_with_mask=mask_of_x),
    "bias, layouts": fault("bias_relu_of_every_layout", bias_relu_with_mask=mask_of_x),
    "dbias, of dy": fault(DBIAS, bias_relu_backward=sum_of_dy),
    "dbias, dead units": fault("bias_gradient_at_nan_and_infinity", bias_relu_backward=sum_of_dy),
    "dbias, axis": fault("bias_relu_of_every_layout", bias_relu_backward=other_axis),
    "dbias, dtype": fault(DBIAS, bias_relu_backward=keep_dtype),
    "dbias, in float32": fault(
        "bias_gradient_is_summed_in_float64", bias_relu_backward=sum_in_float32
    ),
    "dbias, order": fault(
        "bias_gradient_has_the_same_bits_again", bias_relu_backward=another_order
    ),
    "RReLU": fault(
        "rrelu_obeys_the_table",
        random_uniform=lambda self, rng, low, up, x: BASE.random_uniform(rng, low, up + 1, x),
    ),
}


@pytest.mark.parametrize(("name", "methods"), FAULTS.values(), ids=FAULTS)
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_a_wrong_backend_fails(monkeypatch, name, methods):
    """In a test that is called here with all of its parameters, in float32."""
    test = getattr(conformance, f"test_{name}")
    marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    keys, values = zip(*marks, strict=True) if marks else ((), ())
    library = conformance.library_of(dispatch.namespace("array_api_strict"))
    fixtures = {"library": library, "dtype": "float32"}
    fixtures = {key: fixtures[key] for key in fixtures if key in test.__annotations__}
    monkeypatch.setattr(validation, "_RESOLVED", {})
    monkeypatch.setattr(validation, "_LATEST", {})
    backend = type("Faulty", (Backend,), methods)()
    backend.library = "array_api_strict"
    monkeypatch.setitem(dispatch.BACKENDS, type(xp.asarray(0.0)), backend)

    def run():
        for chosen in itertools.product(*values):
            test(**fixtures, **dict(zip(keys, chosen, strict=True)))

    with pytest.raises((AssertionError, *CANNOT_PICKLE, pytest.fail.Exception)):
        run()


LIMITS = {  # the first floating dtypes, and whether subnormals and payloads are kept
    "numpy": (tuple(reference.DTYPES), True),
    "array_api_strict": (("float32", "float64"), True),
    "torch": (("float16", "float32", "float64"), True),
    "jax": (("float16", "bfloat16", "float32"), False),  # and float64 if it was configured
}


@pytest.mark.parametrize("name", [n for n in LIMITS if LIBRARIES[n].reason is None])
def test_what_a_library_keeps_is_found_out(name):
    """A limit that is found where there is none would hide an error."""
    dtypes, exact = LIMITS[name]
    library = conformance.Library(dispatch.namespace(name))
    assert library.dtypes[: len(dtypes)] == dtypes
    assert library.subnormals == library.payloads == exact
