"""Faults planted in the PTX of CuPy's kernels: interpreter and a few calls find each of them."""

from __future__ import annotations

import re
from unittest import mock

import numpy as np
import pytest
from passes import check_bits
from ptx import Program
from ptx_operations import PtxError

import relu_xp
from relu_xp.testing import reference

cupy_host = pytest.importorskip("cupy_host", exc_type=ImportError)

# What is replaced in the PTX, by what, the dtype of the calls, and how it shows: by the error of
# the interpreter, or (None) by wrong bits.
FAULTS = {
    "a product that flushes subnormals": (r"mul\.rn\.f32", "mul.rn.ftz.f32", "float32", None),
    "a sum that flushes subnormals": (r"add\.rn\.f32", "add.rn.ftz.f32", "float32", None),
    "a comparison that flushes subnormals": (
        r"setp\.lt\.s32(\s+%p\d+, %r\d+), -8388607",
        r"setp.le.ftz.f32\1, 0f00000000",  # without ftz it is as good
        "float32",
        None,
    ),
    "a conversion that flushes subnormals": (r"cvt\.f64\.f32", "cvt.ftz.f64.f32", "float64", None),
    "a comparison of conversions that flushes": (
        r"cvt\.f64\.f32(\s+%fd\d+, %f1;)",
        r"cvt.ftz.f64.f32\1",
        "bfloat16",
        None,
    ),
    "a truncated bfloat16": (r"cvt\.rn\.bf16", "cvt.rz.bf16", "bfloat16", None),
    "a truncated float16": (r"cvt\.rn\.f16", "cvt.rz.f16", "float16", None),
    "a truncated product": (r"mul\.rn\.f32", "mul.rz.f32", "float32", None),
    "a number rounded twice": (r"cvt\.rz\.f32\.f64", "cvt.rn.f32.f64", "float16", None),
    "a bfloat16 rounded twice": (r"cvt\.rz\.f32\.f64", "cvt.rn.f32.f64", "bfloat16", None),
    "a vote that names an absent thread": (
        r"(vote\.sync\.ballot\.b32\s+%r\d+, %p\d+), %r\d+",
        r"\1, -1",
        "float32",
        "names a thread that does not arrive: vote",
    ),
    "a shuffle that names an absent thread": (
        r"(shfl\.sync\.down\.b32\s.*), %r\d+;",
        r"\1, -1;",
        "float32",
        "names a thread that does not arrive: shfl",
    ),
    "another lane": (r"(shfl\.sync\.down\.b32\s[^,]*, %r\d+), %r\d+,", r"\1, 3,", "float32", None),
    "another branch": (
        r"setp\.lt\.s32(\s+%p\d+, %r\d+), -8388607",
        r"setp.le.s32\1, -8388607",
        "float32",
        None,
    ),
    "another offset, out of bounds": (r"\+512\]", "+4096]", "float32", "outside of the arrays"),
    "another offset, misaligned": (r"\+512\]", "+520]", "float32", "not aligned to 16 bytes"),
    "two writers": (
        r"(st\.global\.v4\.u32\s+\[%rd\d+)\+512\]",
        r"\1+16]",
        "float32",
        "two threads touch what one of them writes: st",
    ),
    "a register that is not written": (
        r"mov\.u32\s+%r\d+, %tid\.x;",
        "",
        "float32",
        "is not written yet",
    ),
}


# To be rounded once: near the middle of two numbers, and in the middle of two that are subnormal.
# 1e-40 is subnormal in float32.
PRECISE = {
    "float16": np.array([1 + 2.0**-11 - 2.0**-40, 2.5 * 2.0**-24]),
    "bfloat16": np.array([1 + 2.0**-8 - 2.0**-40, 2.5 * 2.0**-133]),
    "float32": np.array([1 + 2.0**-24 - 2.0**-50, 2.5 * 2.0**-149]),
    "float64": np.array([0.3, 1e-40], np.float32),
}


def results(array, dtype):
    """Return what some calls give for arrays of a dtype, which `array` makes of NumPy arrays."""
    form = reference.Format(dtype)
    rng = np.random.default_rng(5)
    words = rng.choice(reference.specials(dtype), (5, 312))
    x, dy = array(words.view(form.dtype)), array(words[::-1].copy().view(form.dtype))
    biases = rng.choice(reference.specials(dtype), 317).view(form.dtype)
    bias, bias_of_rows = array(biases[5:].copy()), array(biases[:5].copy())
    ones = array(np.ones((5, 312), form.dtype))
    y, pullback = relu_xp.relu_vjp(x)
    summed, summed_pullback = relu_xp.bias_relu_vjp(x, bias)
    _, rows_pullback = relu_xp.bias_relu_vjp(x, bias_of_rows, axis=0)
    found = [y, pullback._residuals.data, pullback(dy), summed, relu_xp.leaky_relu(x, 0.3)]
    found += [*summed_pullback(ones), *rows_pullback(ones)]
    for host in (PRECISE[dtype], PRECISE[dtype].astype(np.float32)):
        host = np.resize(host, (5, 312))
        row, half = array(host[0].copy()), array(host / host.dtype.type(2))
        zeros = array(np.zeros((5, 312), form.dtype))
        of_one = array(np.where(np.arange(5)[:, None] == 0, host, 0).astype(host.dtype))
        found += [relu_xp.prelu(x, row), relu_xp.bias_relu(zeros, row)]
        found += [relu_xp.squared_relu_vjp(half)[1](ones)]
        found += relu_xp.bias_relu_vjp(ones, array(np.zeros(312, form.dtype)))[1](of_one)
    return found


def check(dtype):
    with np.errstate(all="ignore"):  # ml_dtypes warns of NaN
        wanted = results(np.ascontiguousarray, dtype)
        found = [cupy_host.to_numpy(x) for x in results(cupy_host.array, dtype)]
        for number, (got, right) in enumerate(zip(found, wanted, strict=True)):
            check_bits(got, right, number, any_nan=right.dtype.kind != "u")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(launches, fault):
    pattern, replacement, dtype, message = FAULTS[fault]
    changed = []

    def compiled(code, architecture):
        text = cupy_host.ptx_of(code, architecture)
        faulty = re.sub(pattern, replacement, text)
        changed.append(faulty != text)
        return Program(faulty)

    check(dtype)
    with (
        mock.patch.object(cupy_host, "compiled", compiled),
        pytest.raises(PtxError if message else AssertionError, match=message) as raised,
    ):
        check(dtype)
    assert any(changed)
    assert isinstance(raised.value, PtxError) == (message is not None)
