"""bits.py: every digest has its part to say, and what differs is found.

That they are the same, from Python to Python, from NumPy to NumPy, .ci/reproduce.py shows.
"""

from __future__ import annotations

import bits
import numpy as np
import pytest

from relu_xp import dispatch

# The lines of a dtype that tell of one bit, in one result of a function of the backend's.
TOLD_BY = {
    "forward": {"forward", "layouts", "large", "large, variants", "rrelu"},
    "forward_saving": {"vjp", "layouts", "large"},
    "backward": {"vjp", "layouts", "large"},
    "backward_from_input": {"backward", "layouts", "large"},
    "gradient": {"gradient", "layouts"},
    "sloped": {"prelu", "rrelu", "large, variants"},
    "slopes_gradient": {"prelu", "sums", "large, variants"},
    "squared": {"squared_relu", "large, variants"},
    "backward_squared": {"squared_relu", "large, variants"},
    "both": {"crelu", "large, variants"},
    "backward_both": {"crelu", "large, variants"},
}
# Without compiled kernels, some functions call others.
ALSO = {"forward": {"vjp"}, "backward_from_input": {"gradient"}}


def found(dtype):
    """Return the digests of one dtype, of small arrays."""
    small = {bits.large: (1 << 13,), bits.large_variants: ((10, 17, 6),)}
    return {
        name.removeprefix(f"{dtype} "): bits.digest(function(*arguments, *small.get(function, ())))
        for name, (function, *arguments) in bits.groups().items()
        if name.startswith(f"{dtype} ") and " by " not in name
    }


@pytest.mark.parametrize("function", TOLD_BY)
@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.libraries("ndarray")
def test_one_bit_of_one_result_changes_the_digests(xp, monkeypatch, function, kind):
    monkeypatch.setattr(bits, "every", lambda dtype: bits.drawn(dtype, 600, 0))
    backend = dispatch.backend_for("test", "x", np.ones(1))
    before, original, done = found(kind), getattr(backend, function), []

    def changed(*arguments):
        result = original(*arguments)
        array = result[0] if isinstance(result, tuple) else result
        if array.size and array.dtype.kind == "f":
            array[(*(slice(1),) * array.ndim, ...)].view(f"u{array.itemsize}")[...] ^= 1
            done.append(array)
        return result

    assert before == found(kind), "the same every time"
    monkeypatch.setattr(backend, function, changed)
    after = found(kind)
    assert done
    wanted = TOLD_BY[function] | (set() if xp.compiled else ALSO.get(function, set()))
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
