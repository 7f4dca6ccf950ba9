"""bits.py: every digest depends on every bit, and a difference is found.

That they are the same, from Python to Python, from NumPy to NumPy, .ci/reproduce.py shows.
"""

from __future__ import annotations

import functools

import bits
import numpy as np
import pytest

from relu_xp import dispatch

# The lines of a dtype that change with one bit of one result of a backend's method.
LINES = {
    "forward": {"forward", "layouts", "large", "large, variants", "rrelu"},
    "forward_with_mask": {"vjp", "layouts", "large"},
    "backward": {"vjp", "layouts", "large"},
    "backward_from_input": {"backward", "gradient", "layouts", "large"},
    "prelu": {"prelu", "rrelu", "large, variants"},
    "prelu_weight_grad": {"prelu", "sums", "large, variants"},
    "squared_relu": {"squared_relu", "large, variants"},
    "squared_relu_backward": {"squared_relu", "large, variants"},
    "crelu": {"crelu", "large, variants"},
    "crelu_backward": {"crelu", "large, variants"},
    "bias_relu_with_mask": {"bias", "large, bias"},
    "bias_relu_backward": {"bias", "large, bias", "bias sums"},
}
# And those that change too without kernels: there a method of a bias calls that without one.
CALLED = {
    "forward": {"vjp", "bias", "large, bias"},
    "forward_with_mask": {"bias", "large, bias"},
    "backward": {"bias", "large, bias", "bias sums"},
}


def found(dtype):
    """Return the digests of one dtype, of small arrays."""
    small = {bits.large: (1 << 13,), bits.large_variants: ((10, 17, 6),)}
    return {
        name.removeprefix(f"{dtype} "): bits.digest(function(*arguments, *small.get(function, ())))
        for name, (function, *arguments) in bits.groups().items()
        if name.startswith(f"{dtype} ") and " by " not in name
    }


@functools.cache
def unchanged(library):
    """Return what is found with a library, which is the same every time."""
    digests = found("float32")
    assert digests == found("float32")
    return digests


@pytest.mark.slow
@pytest.mark.parametrize("function", LINES)
@pytest.mark.libraries(names=["numpy", "compiled"])
def test_one_bit_of_one_result_changes_the_digests(xp, monkeypatch, function):
    monkeypatch.setattr(bits, "every", lambda dtype: bits.mixed(dtype, 600, 0))
    backend = dispatch.backend_for("test", "x", np.ones(1))
    before, original, done = unchanged(xp.name), getattr(backend, function), []

    def changed(*arguments):
        result = original(*arguments)
        for array in result if isinstance(result, tuple) else (result,):
            if isinstance(array, np.ndarray) and array.size and array.dtype.kind == "f":
                array[(*(slice(1),) * array.ndim, ...)].view(f"u{array.itemsize}")[...] ^= 1
                done.append(array)
        return result

    monkeypatch.setattr(backend, function, changed)
    after = found("float32")
    assert done
    wanted = LINES[function]
    if not xp.compiled:
        wanted = wanted | CALLED.get(function, set())
    assert {name for name in before if before[name] != after[name]} == wanted


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        ({}, None),
        ({"float32 vjp": "1"}, "float32 vjp: a, c | b"),
        ({"float32 vjp": None}, "float32 vjp: missing in b"),
        ({"bfloat16 vjp": None}, None),
        ({"bfloat16 vjp": "1"}, "bfloat16 vjp: a, c | b"),
    ],
)
def test_what_differs_or_is_missing_is_found(tmp_path, monkeypatch, change, flaw):
    names = ["integers", "float32 vjp", "bfloat16 vjp", "float32 by bfloat16 vjp"]
    monkeypatch.setattr(bits, "groups", lambda: dict.fromkeys(names))
    right = dict.fromkeys(names, "0")
    files = [tmp_path / name for name in "abc"]
    for file in files:
        lines = right | (change if file.name == "b" else {})
        file.write_text("".join(f"{name} {value}\n" for name, value in lines.items() if value))
    assert bits.compare(files) == ([] if flaw is None else [flaw])
    for file in files:
        file.write_text("")
    assert len(bits.compare(files)) == 2, "what nobody has is missing too"
    assert bits.compare(files[:1])
