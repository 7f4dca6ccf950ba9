"""The reference is independent of the package, and computes as NumPy does where that is right."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from relu_xp.testing import reference


def test_the_reference_imports_nothing_of_the_package():
    tree = ast.parse(Path(reference.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names <= {
        "__future__",
        "collections.abc",
        "functools",
        "ml_dtypes",
        "numpy",
        "typing",
    } | {"numpy.typing"}
    assert all(getattr(node, "level", 0) == 0 for node in imports)


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_products_sums_and_rounding_are_those_of_numpy(dtype):
    form, bits = reference.Format(dtype), reference.specials(dtype)
    left, right = (pair.ravel() for pair in np.meshgrid(bits, bits))
    for ours, theirs in ((form.product, np.multiply), (form.sum, np.add)):
        with np.errstate(all="ignore"):
            wanted = theirs(left.view(form.dtype), right.view(form.dtype))
        found = map(ours, left.tolist(), right.tolist())
        reference.Expected(form, found).check(wanted, left, right, payloads=False)
    for other in map(reference.Format, reference.DTYPES):
        patterns = reference.patterns(other.name)
        with np.errstate(all="ignore"):
            wanted = patterns.view(other.dtype).astype(form.dtype)
        found = [form.convert(one, other) for one in patterns.tolist()]
        if other.name != "float64" or dtype != "bfloat16":  # ml_dtypes may round twice
            reference.Expected(form, found).check(wanted, payloads=False)
    for number in (0.1, -1e-8, 1 / 3, 1.0, 6.0, 2.0**-24, -65504.0):
        assert form.round(number) == np.array(number).astype(form.dtype).view(form.unsigned)


def test_a_result_is_compared_as_far_as_a_library_can():
    form = reference.Format("float32")
    expected = reference.Expected(form, [0, 1, form.infinity + 5, reference.ANY_NAN])
    right = np.array([0, 1, form.infinity + 5, form.infinity + 9], np.uint32)
    expected.check(right.view(np.float32))
    flushed = np.array([0, 0, form.infinity + 1, form.infinity + 9], np.uint32)
    inputs = np.ones(4, np.uint32)
    expected.check(flushed.view(np.float32), inputs, subnormals=False, payloads=False)
    for kept in ({"subnormals": False}, {"payloads": False}, {}):
        with pytest.raises(AssertionError, match=r"wrong; x, dy, \.\.\."):
            expected.check(flushed.view(np.float32), *(inputs,) * ("payloads" in kept), **kept)
    for wrong in (np.zeros(3, np.float32), np.zeros(4)):
        with pytest.raises(AssertionError, match="shape|dtype"):
            expected.check(wrong)
