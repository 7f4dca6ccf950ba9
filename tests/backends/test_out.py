"""Rule A4: where an `out` may lie; what is refused has written nothing."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from table import CASES, ROWS

import relu_xp

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
OVERLAP = "out overlaps an input without being the same"


def calls(xp, x, dy, case):
    """Return every call that takes an `out`, by the array that lies beside it."""
    _, pullback = relu_xp.relu_vjp(xp.array(x.copy()), **case)
    fresh_x, fresh_dy = xp.array(x.copy()), xp.array(dy.copy())
    return {
        "x": [
            lambda x, out: relu_xp.relu(x, **case, out=out),
            lambda x, out: relu_xp.relu_vjp(x, **case, out=out)[0],
            lambda x, out: relu_xp.relu_grad(x, **case, out=out),
            lambda x, out: relu_xp.relu_backward(fresh_dy, x, **case, out=out),
            lambda x, out: relu_xp.squared_relu(x, out=out),
            lambda x, out: relu_xp.prelu(x, xp.array(np.full(1, 0.5, np.float32)), out=out),
            lambda x, out: relu_xp.bias_relu(x, *ROWS["bias_relu"].learned(xp, x), **case, out=out),
        ],
        "dy": [
            lambda dy, out: pullback(dy, out=out),
            lambda dy, out: relu_xp.relu_backward(dy, fresh_x, **case, out=out),
        ],
    }


@pytest.mark.libraries("writable")
@each_case
def test_the_very_input_may_be_out(xp, case):
    """A mask that is made too late, of f(x), would show; so would a block that is read late."""
    size = 140_003 if xp.ndarray else 10_003  # the compiled kernels work in threads there
    x, dy = np.random.default_rng(4).standard_normal((2, size)).astype(np.float32) * 2
    for host, group in zip((x, dy), calls(xp, x, dy, case).values(), strict=True):
        for call in group:
            wanted = xp.numpy(call(xp.array(host.copy()), None)).copy()
            array = xp.array(host.copy())
            assert call(array, array) is array
            np.testing.assert_array_equal(xp.numpy(array), wanted)
    mine = xp.array(x.copy())
    _, pullback = relu_xp.relu_vjp(mine, **case, out=mine)
    wanted = relu_xp.relu_backward(xp.array(dy), xp.array(x), **case)
    np.testing.assert_array_equal(xp.numpy(pullback(xp.array(dy))), xp.numpy(wanted))


# Disjoint parts of an array of shape (8, 12): an input and an out.
DISJOINT = {
    "channels": (np.s_[:, :4], np.s_[:, 8:]),
    "rows": (np.s_[2::3, :], np.s_[:6:3, :]),
    "columns": (np.s_[:, ::3], np.s_[:, 2::3]),
    "rows and columns": (np.s_[::2, ::2], np.s_[::2, 1::2]),
}


@pytest.mark.libraries("writable")
@pytest.mark.parametrize(
    ("parts", "case"), list(zip(DISJOINT.values(), CASES.values(), strict=False)), ids=DISJOINT
)
def test_an_out_between_the_elements_of_an_input(xp, parts, case):
    """What shares no memory is accepted, and nothing else is written."""
    host = np.random.default_rng(7).standard_normal((8, 12)).astype(np.float32)
    part, of_out = parts
    x = host[part]
    for group in calls(xp, x, x, case).values():
        for call in group:
            memory, expected = xp.array(host.copy()), host.copy()
            out = memory[of_out]
            assert call(memory[part], out) is out
            expected[of_out] = xp.numpy(call(xp.array(x.copy()), None))
            np.testing.assert_array_equal(xp.numpy(memory), expected)


@pytest.mark.libraries("writable")
@pytest.mark.parametrize(
    ("of_x", "of_out"),
    [
        (np.s_[:5], np.s_[4:9]),
        (np.s_[0:20:2], np.s_[18:38:2]),
        (np.s_[0:7:3], np.s_[2:11:4]),
        (np.s_[0:16:5], np.s_[:13:4]),  # which share their first, and no other
    ],
    ids=str,
)
def test_one_shared_element_is_refused(xp, of_x, of_out):
    host = np.arange(-20.0, 20.0, dtype=np.float32)
    memory = xp.array(host.copy())
    for group in calls(xp, host[of_x], host[of_x], {}).values():
        for call in group[:5]:
            with pytest.raises(ValueError, match=OVERLAP):
                call(memory[of_x], memory[of_out])
    np.testing.assert_array_equal(xp.numpy(memory), host)


@pytest.mark.libraries("strided")
def test_an_out_whose_elements_share_memory_is_refused(xp):
    host = np.arange(-4.0, 4.0, dtype=np.float32)
    for shape, strides in (((8,), (0,)), ((6, 3), (4, 4)), ((2, 3), (8, 4))):
        out = xp.array(as_strided(host, shape, strides))
        with pytest.raises(ValueError, match="^relu: out is a broadcast view"):
            relu_xp.relu(xp.array(np.ones(shape, np.float32)), out=out)
    np.testing.assert_array_equal(host, np.arange(-4, 4))


@pytest.mark.libraries("strided")
@pytest.mark.parametrize("strides", [(3, 2), (2, 3), (-3, 2), (5, 1)], ids=str)
def test_an_out_whose_elements_interlock(xp, strides):
    """Rows begin within the span of others, but no two elements share memory."""
    shape = (2, 3) if strides != (2, 3) else (3, 2)
    host = np.arange(-6.0, 6.0, dtype=np.float32)
    x = -np.arange(6.0, dtype=np.float32).reshape(shape) + 2
    start = host[3:] if strides[0] < 0 else host
    out = xp.array(as_strided(start, shape, [4 * stride for stride in strides]))
    assert relu_xp.relu(xp.array(x), out=out) is out
    np.testing.assert_array_equal(xp.numpy(out), np.maximum(x, 0))


def test_an_overlap_that_takes_long_to_decide_is_refused():
    """These two share no memory, but to find that out takes seconds."""
    memory = np.zeros(6_100_000, np.int8)
    x = as_strided(memory, (5,) * 5, (337339, 456899, 155319, 163595, 145006))
    out = as_strided(memory[626837:], (5,) * 5, (125771, 532871, 131173, 135522, 75266))
    with pytest.raises(ValueError, match=f"^relu: {OVERLAP}"):
        relu_xp.relu(x, out=out)


def test_the_imaginary_part_as_an_out(require):
    for z in (np.array([-1 + 5j, 2 - 7j]), require("torch").tensor([-1 + 5j, 2 - 7j])):
        assert relu_xp.relu(z.real, out=z.imag).tolist() == [0, 2]
        assert z.tolist() == [-1 + 0j, 2 + 2j]


def test_what_only_writing_shows_to_be_read_only_is_refused(require):
    strict, host = require("array_api_strict"), np.ones(3)
    host.flags.writeable = False
    with pytest.raises(ValueError, match="out cannot be written: ") as refused:
        relu_xp.relu(strict.ones(3), out=strict.asarray(host, copy=False))
    assert isinstance(refused.value.__cause__, ValueError)
